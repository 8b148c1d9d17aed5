"""An answer as the items of OpenAI's responses API, and as the events of its streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Update
from qnext.server.surfaces.answers import chat_logprob, usage_counts
from qnext.server.surfaces.held import ReadAnswer
from qnext.server.surfaces.openai.foreign import call_item
from qnext.server.surfaces.source import Source
from qnext.server.surfaces.tools import Origin
from qnext.server.surfaces.writing import Event, named_frames
from qnext.text.output import Call, CallArguments, CallCut, CallEnd, CallStart, Content, OutputEvent, Reasoning

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}  # why, by the reason of the end
ItemKind = Literal["message", "reasoning"]
_PART = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponseWriter:
    """Reasoning, messages and function calls, in the order in which they come.

    `echo` is what the response repeats of its request. `num_top` None means no log-probabilities.
    """

    frames = staticmethod(named_frames)

    def __init__(
        self,
        exchange: Exchange,
        answer: ReadAnswer,
        echo: dict[str, Any],
        *,
        num_top: int | None = None,
        origins: Mapping[str, Origin] | None = None,
    ) -> None:
        self.exchange = exchange
        self.answer = answer
        self.id = f"resp_{secrets.token_hex(12)}"
        self.items: list[dict[str, Any]] = []
        self._echo = echo
        self._num_top = num_top
        self._origins = origins or {}
        self._origin: Origin | None = None  # of the tool that is being called
        self._called = ""  # and the name by which the model called it
        self._kind: ItemKind | None = None  # of the item that is open
        self._texts: list[str] = []  # its pieces
        self._logged: list[dict[str, Any]] = []  # log-probabilities of its tokens
        self._unsent: list[dict[str, Any]] = []  # and of those whose text is held back
        self._num_seen = 0  # tokens of the answer that were looked at
        self._number = 0  # of the next event
        self._end: dict[str, Any] = {"status": "in_progress", "error": None, "incomplete_details": None, "usage": None}

    def document(self) -> dict[str, Any]:
        """The response as far as it is written."""
        name = self.exchange.model_name
        head = {"id": self.id, "object": "response", "model": name, "completed_at": None}
        return {**head, **self._echo, **self._end, "output": self.items}

    def begin(self, source: Source) -> list[Event]:
        return [self._lifecycle("created"), self._lifecycle("in_progress")]

    def take(self, update: Update, source: Source) -> list[Event]:
        events = self.answer.take(update, source)
        self._log()
        return self.write(events)

    def write(self, events: list[OutputEvent]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if not isinstance(event, (Content, Reasoning)):
                found += self._call(event)
                self._unsent.clear()
                continue
            kind: ItemKind = "message" if isinstance(event, Content) else "reasoning"
            if kind != self._kind:
                found += self._close("completed") + self._open(kind)
            self._texts.append(event.text)
            more: dict[str, Any] = {}
            if kind == "message":
                more["logprobs"], self._unsent = self._unsent, []
                self._logged += more["logprobs"]
            found.append(self._event(f"{_PART[kind]}.delta", content_index=0, delta=event.text, **more))
        return found

    def ping(self) -> Event:
        """The event that OpenAI's own server sends, although its schema does not contain it."""
        number = self._number
        self._number += 1
        return {"type": "keepalive", "sequence_number": number}

    def end(self, source: Source) -> list[Event]:
        cause = _INCOMPLETE.get(self.answer.end_reason or "")
        is_cut = cause is not None
        found = self._close("incomplete" if is_cut else "completed")
        prompt, cached, generated, reasoning = usage_counts(source.of_prompts[0], [self.answer])
        status = "incomplete" if is_cut else "completed"
        self._end |= {
            "status": status,
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": cause} if is_cut else None,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": reasoning},
                "total_tokens": prompt + generated,
            },
        }
        self.exchange.outcome.finish_reason = self.answer.end_reason
        return [*found, self._lifecycle(status)]

    def refuse(self, error: ApiError) -> list[Event]:
        """A response that fails before it has begun."""
        return [self._lifecycle("created"), *self.fail(error)]

    def fail(self, error: ApiError) -> list[Event]:
        self._close("incomplete")  # what was written stands in the response
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        if error.code == "context_length_exceeded":
            code = error.code
        self._end |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return [self._lifecycle("failed")]

    def _log(self) -> None:
        """Log-probabilities of the new tokens, unless they are of the thought."""
        tokens = self.answer.tokens[self._num_seen :]
        self._num_seen += len(tokens)
        if self._num_top is not None and not self.answer.is_reasoning:
            served = self.exchange.server.served
            self._unsent += [chat_logprob(served, token, self._num_top) for token in tokens]

    def _numbered(self, event: str, /, **fields: Any) -> Event:
        number = self._number
        self._number += 1
        return {"type": f"response.{event}", "sequence_number": number, **fields}

    def _lifecycle(self, name: str) -> Event:
        return self._numbered(name, response={**self.document(), "output": [dict(item) for item in self.items]})

    def _event(self, event: str, /, **fields: Any) -> Event:
        """An event of the item that came last."""
        return self._numbered(event, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _item_event(self, name: str, item: dict[str, Any]) -> Event:
        return self._numbered(f"output_item.{name}", output_index=len(self.items) - 1, item=item)

    def _open(self, kind: ItemKind) -> list[Event]:
        self._kind = kind
        item: dict[str, Any] = {"id": _id("msg" if kind == "message" else "rs"), "type": kind, "content": []}
        if kind == "message":
            item["role"] = "assistant"
        else:
            item |= {"summary": [], "encrypted_content": None}
        self.items.append({**item, "status": "in_progress"})
        part = self._part(kind)
        added = self._item_event("added", dict(self.items[-1]))
        return [added, self._event("content_part.added", content_index=0, part=part)]

    def _close(self, status: str) -> list[Event]:
        kind, self._kind = self._kind, None
        if kind is None:
            return []
        part = self._part(kind)
        self._texts.clear()
        self._logged = []
        self.items[-1] |= {"content": [part], "status": status}
        more = {"logprobs": part["logprobs"]} if kind == "message" else {}
        return [
            self._event(f"{_PART[kind]}.done", content_index=0, text=part["text"], **more),
            self._event("content_part.done", content_index=0, part=part),
            self._item_event("done", self.items[-1]),
        ]

    def _part(self, kind: ItemKind) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PART[kind], "text": "".join(self._texts)}
        return {**part, "annotations": [], "logprobs": self._logged} if kind == "message" else part

    def _call(self, event: CallStart | CallArguments | CallEnd | CallCut) -> list[Event]:
        if isinstance(event, CallStart):
            closed = self._close("completed")
            self._origin = self._origins.get(event.name)
            self._called = event.name
            if self._origin is not None and self._origin.kind != "function":
                return closed  # its item is made of the whole call
            name, more = event.name, {}
            if self._origin is not None:
                name, more = self._origin.name, {"namespace": self._origin.namespace}
            item = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": name, **more}
            self.items.append({**item, "arguments": "", "status": "in_progress"})
            return [*closed, self._item_event("added", dict(self.items[-1]))]
        is_whole = self._origin is not None and self._origin.kind != "function"
        if isinstance(event, CallArguments):
            self._texts.append(event.text)
            return [] if is_whole else [self._event("function_call_arguments.delta", delta=event.text)]
        arguments = "".join(self._texts)
        self._texts.clear()
        status = "completed" if isinstance(event, CallEnd) else "incomplete"
        if self._origin is not None and is_whole:
            return self._foreign({**call_item(Call(self._called, arguments), self._origin), "status": status})
        self.items[-1] |= {"arguments": arguments, "status": status}
        return [
            self._event("function_call_arguments.done", arguments=arguments, name=self.items[-1]["name"]),
            self._item_event("done", self.items[-1]),
        ]

    def _foreign(self, item: dict[str, Any]) -> list[Event]:
        """A call of a tool that is no function."""
        self.items.append(item)
        begun = {**item, "status": "in_progress"}
        if item["type"] != "custom_tool_call":
            return [self._item_event("added", begun), self._item_event("done", item)]
        return [
            self._item_event("added", {**begun, "input": ""}),
            self._event("custom_tool_call_input.delta", delta=item["input"]),
            self._event("custom_tool_call_input.done", input=item["input"]),
            self._item_event("done", item),
        ]


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
