"""A server as lm-evaluation-harness asks it: its own clients, with a key that no environment variable holds."""

from __future__ import annotations

from typing import Any

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from qnext.harness.pairs import KeepsContinuations

_SECONDS = 24 * 3600  # of an answer, which may wait for all others


class ServedCompletions(KeepsContinuations, LocalCompletionsAPI):
    """By token ids of the server's own tokenizer, so that log-likelihoods equal those in process."""

    def __init__(self, *, key: str | None, **options: Any) -> None:
        self._key = key or ""
        super().__init__(max_retries=1, timeout=_SECONDS, auth_token=key, **options)

    @property
    def api_key(self) -> str:
        return self._key


class ServedChat(LocalChatCompletion):
    """By messages: answers alone, no log-likelihoods."""

    def __init__(self, *, key: str | None, **options: Any) -> None:
        self._key = key or ""
        super().__init__(max_retries=1, timeout=_SECONDS, **options)

    @property
    def api_key(self) -> str:
        return self._key


def served_model(url: str, *, key: str | None, model: str, max_length: int, concurrency: int, is_chat: bool) -> Any:
    """`is_chat`: tasks with answers in the chat format."""
    kind, path = (ServedChat, "chat/completions") if is_chat else (ServedCompletions, "completions")
    return kind(key=key, base_url=f"{url}/v1/{path}", model=model, max_length=max_length, num_concurrent=concurrency)
