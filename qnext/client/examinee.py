"""A server as `qnext.eval` asks it: the same questions as to a model in this process, by token ids over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qnext.client.remote import headers_of, model_of, refusal, root_of, unreachable
from qnext.errors import UsageError

_SECONDS = 3600.0  # of an answer to a long prompt
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}  # not the server's own


class RemoteExaminee:
    """A server with the routes /tokenize and /v1/completions, as qnext and vLLM have them. A context manager."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None, concurrency: int = 4) -> None:
        """Raises UsageError where it cannot be reached."""
        import httpx2

        self._root = root_of(url)
        self._model = model_of(self._root, api_key, model)
        self._client = httpx2.Client(base_url=self._root, headers=headers_of(api_key), timeout=_SECONDS)
        self._pool = ThreadPoolExecutor(concurrency)

    @property
    def max_length(self) -> int:
        return int(self._post("/tokenize", {"prompt": "a"}).get("max_model_len") or 1 << 30)

    def encode(self, text: str) -> list[int]:
        return self._post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"] if text else []

    def encode_chat(self, text: str) -> list[int]:
        return self._post("/tokenize", {"messages": [{"role": "user", "content": text}]})["tokens"]

    def complete(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[str]:
        def ask(prompt: list[int]) -> str:
            body = {"prompt": prompt, "max_tokens": max_tokens, **_GREEDY}
            return str(self._post("/v1/completions", body)["choices"][0]["text"])

        return list(self._pool.map(ask, prompts))

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        def ask(pair: tuple[list[int], list[int]]) -> float:
            body = {"prompt": [*pair[0], *pair[1]], "max_tokens": 0, "echo": True, "logprobs": 0, **_GREEDY}
            found = self._post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
            return sum(value or 0.0 for value in found[len(pair[0]) :])

        return list(self._pool.map(ask, pairs))

    def __enter__(self) -> RemoteExaminee:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self._client.close()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        import httpx2

        try:
            response = self._client.post(path, json={"model": self._model, **body})
        except httpx2.HTTPError as error:
            raise unreachable(self._root, error) from None
        if response.status_code != 200:
            raise UsageError(refusal(self._root, response.status_code, response.content))
        return response.json()
