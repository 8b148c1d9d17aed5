"""A conversation with any server that speaks OpenAI's API. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qnext.client.remote import headers_of, model_of, refusal, root_of, stream_events, unreachable
from qnext.errors import UsageError
from qnext.session.talk import DEFAULT_MAX_TOKENS, ChatReply, Stopwatch, Talk, Write, parameter_value

if TYPE_CHECKING:
    import httpx2

    from qnext.text.messages import Message

_CONNECT_SECONDS = 10.0
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = (*_FLOATS, "top_k", "max_tokens", "min_tokens", "seed", "ignore_eos")


@dataclass
class RemoteConversation(Talk):
    """A conversation with a model of a server. Only parameters that the user has set are sent.

    `completes`: inputs are completed as plain text.
    """

    root: str
    api_key: str | None
    model: str
    params: dict[str, Any]
    completes: bool = False

    @property
    def remembers(self) -> bool:
        return not self.completes

    @cached_property
    def client(self) -> httpx2.Client:
        import httpx2

        timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
        return httpx2.Client(base_url=self.root, headers=headers_of(self.api_key), timeout=timeout)

    def _ask(self, text: str, turns: list[Message], write: Write, write_thought: Write) -> ChatReply:
        import httpx2

        path = "/v1/completions" if self.completes else "/v1/chat/completions"
        content: list[str] = []
        thought: list[str] = []
        self.stopwatch = Stopwatch()
        try:
            # Ctrl-C leaves the stream, which closes the connection: the server ends what nobody reads.
            with (
                contextlib.suppress(KeyboardInterrupt),
                self.client.stream("POST", path, json=self._body(text, turns)) as response,
            ):
                if response.status_code != 200:
                    raise UsageError(refusal(self.root, response.status_code, response.read()))
                self._read(response, content, thought, write, write_thought)
        except httpx2.HTTPError as error:
            raise unreachable(self.root, error) from None
        return ChatReply("".join(content), "".join(thought) or None)

    def _read(
        self, response: httpx2.Response, content: list[str], thought: list[str], write: Write, write_thought: Write
    ) -> None:
        assert self.stopwatch is not None
        for document in stream_events(response):
            for choice in document.get("choices") or ():
                delta = choice.get("delta") or {}
                said = choice.get("text") if self.completes else delta.get("content")
                thinking = delta.get("reasoning_content") or delta.get("reasoning")
                if said or thinking:
                    self.stopwatch.tick()
                if thinking:
                    thought.append(thinking)
                    write_thought(thinking)
                if said:
                    content.append(said)
                    write(said)
            usage = document.get("usage")
            if isinstance(usage, Mapping) and isinstance(usage.get("completion_tokens"), int):
                self.stopwatch.num_tokens = usage["completion_tokens"]

    def _body(self, text: str, turns: list[Message]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        body |= self.params
        if self.stop:
            body["stop"] = list(self.stop)
        if self.completes:
            return {**body, "prompt": text}
        if self.wants_json:
            body["response_format"] = {"type": "json_object"}
        thinks = {} if self.thinks is None else {"enable_thinking": self.thinks}
        if arguments := {**thinks, **self.template_arguments}:
            body["chat_template_kwargs"] = arguments
        head = [{"role": "system", "content": self.system}] if self.system else []
        body["messages"] = [*head, *({"role": turn.role, "content": turn.content} for turn in turns)]
        return body

    def set_parameter(self, name: str, value: str) -> None:
        if name == "stop":
            self.stop = (value,) if value else ()
            return
        if name not in _KNOWN:
            raise UsageError(f"no parameter {name!r}; known: {', '.join(sorted((*_KNOWN, 'stop')))}")
        parsed = parameter_value(name, value)
        if not isinstance(parsed, (int, float, type(None))) or parsed != parsed:
            raise UsageError(f"{name}: {value!r} is not a number")
        self.params = _given({**self.params, name: parsed})

    def parameters(self) -> dict[str, Any]:
        return dict(self.params)

    def _read_parameters(self, values: dict[str, Any]) -> Callable[[], None]:
        for name, value in values.items():
            if name in _KNOWN and not isinstance(value, (int, float, type(None))):
                raise UsageError(f"{name} must be a number")
        params = _given({name: value for name, value in values.items() if name in _KNOWN})
        return lambda: setattr(self, "params", params)

    def info(self) -> list[str]:
        kind = "completion, no memory" if self.completes else "chat"
        return [f"model {self.model} at {self.root}", kind]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def open_remote(
    url: str, api_key: str | None, model: str | None, params: dict[str, Any], *, completes: bool = False, **talk: Any
) -> RemoteConversation:
    """A conversation with `model` of a server, or with the first model that the server lists. `talk` are fields of
    Talk.

    Raises UsageError where the server cannot be reached or refuses the key, and for a system message in plain
    completion.
    """
    if completes and talk.get("system") is not None:
        raise UsageError("a system message needs a conversation, not --complete")
    root = root_of(url)
    name = model_of(root, api_key, model)
    params = {"max_tokens": DEFAULT_MAX_TOKENS, **params} if completes else params
    return RemoteConversation(root, api_key, name, params, completes=completes, **talk)
