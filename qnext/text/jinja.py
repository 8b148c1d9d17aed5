"""A folder's own chat template: rendered in a limited child process, with untrusted text kept apart.

A template sees strings and may search them, so nothing is wrapped around them. Where an untrusted string holds the
name of an added token, one private-use character replaces the name, and becomes an untrusted piece after rendering.
The result must equal the rendering of the unchanged strings. Else markup names (`<think>`) are left readable, first in
assistant turns, then everywhere; control tokens never are, and a template that needs them is refused. A name that a
template builds of several harmless strings would not be noticed.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qnext.confined.process import ConfinedFailure, ConfinedLimits, ConfinedProcess
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.text.messages import Message, message_to_dict, raw_arguments
from qnext.text.tokenizer import Piece

_WORKER = Path(__file__).with_name("jinja_worker.py")
_FIRST_PRIVATE, _LAST_PRIVATE = 0xF0000, 0xFFFFD
_ARGUMENTS = ("documents",)  # of a conversation, and None where nobody gives them
_CONTEXT = ("messages", "tools", "add_generation_prompt")


class TemplateRefusal(UsageError):
    """The template itself refuses a conversation. The message is the template's."""


@dataclass(frozen=True)
class TemplateLimits:
    """The limits of one rendering: wall-clock seconds, address space in bytes, characters of output."""

    seconds: float = 3.0
    memory_bytes: int = 512 << 20
    output_characters: int = 16 << 20


class JinjaTemplate:
    """A chat template of unknown origin.

    `source` names the file in errors. `markup_names` and `control_names` are the added tokens of the tokenizer.
    `variables` are the names that templates expect beside the conversation (`bos_token`, `eos_token`).
    """

    def __init__(
        self,
        text: str,
        *,
        source: str = "chat template",
        control_names: Collection[str] = (),
        markup_names: Collection[str] = (),
        variables: Mapping[str, str] | None = None,
        limits: TemplateLimits | None = None,
    ) -> None:
        self._text = text
        self._source = source
        self._control_names = frozenset(control_names)
        self._markup_names = frozenset(markup_names) - self._control_names
        self._variables = dict(variables or {})
        self._limits = limits or TemplateLimits()
        self._worker: ConfinedProcess | None = None
        self._lock = threading.Lock()

    @property
    def text(self) -> str:
        return self._text

    @cached_property
    def arguments(self) -> frozenset[str]:
        """Names that the template reads beside the conversation and the tokens; none where the template is faulty."""
        answer = self._ask({"names": True})
        return frozenset(answer.get("names", ())) - {*_CONTEXT, *self._variables}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """Pieces of the rendered conversation; `arguments` are what else the template reads, by name.

        Arguments of calls that are no JSON object reach the template as the text that they are; where it drops that,
        or fails, as one argument. Raises TemplateRefusal where the template refuses the conversation,
        CorruptCheckpoint naming the template where it is faulty or exceeds its limits.
        """
        context: dict[str, Any] = {
            "tools": list(tools),
            "more": dict(arguments or {}),
            "add_generation_prompt": add_generation_prompt,
        }
        raw = raw_arguments(messages)
        if not raw:
            return self._pieces([message_to_dict(message) for message in messages], **context)
        try:
            pieces = self._pieces([message_to_dict(message) for message in messages], **context)
        except CorruptCheckpoint:
            pieces = []
        text = "".join(piece.text for piece in pieces)
        if all(found in text or json.dumps(found, ensure_ascii=False)[1:-1] in text for found in raw) and pieces:
            return pieces
        return self._pieces([message_to_dict(message, with_objects=True) for message in messages], **context)

    def _pieces(
        self, conversation: list[dict[str, Any]], tools: list[Any], more: dict[str, Any], add_generation_prompt: bool
    ) -> list[Piece]:
        all_names = self._control_names | self._markup_names
        raw = self._run(conversation, tools, more, add_generation_prompt)
        if not _names_inside([conversation, tools, more], all_names):
            return [Piece(raw, True)]
        attempts = [
            (all_names, all_names),
            (self._control_names, all_names),
            (self._control_names, self._control_names),
        ]
        for assistant_names, other_names in attempts:
            marks = self._private_marks(all_names, conversation, [tools, more])
            in_assistant, elsewhere = _MarkNames(marks, assistant_names), _MarkNames(marks, other_names)
            masked = self._run(
                [in_assistant.message(m) if m["role"] == "assistant" else elsewhere.message(m) for m in conversation],
                elsewhere.value(tools),
                {name: elsewhere.value(value) for name, value in more.items()},
                add_generation_prompt,
            )
            names_by_mark = {mark: name for name, mark in marks.items()}
            pieces = _split_at_marks(masked, names_by_mark)
            if "".join(piece.text for piece in pieces) == raw:
                return pieces
        raise UsageError(f"{self._source}: cannot keep the token names in this conversation apart from its markup")

    def close(self) -> None:
        """End the child process; a later render starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.kill()
                self._worker = None

    def _private_marks(
        self, names: Collection[str], conversation: Sequence[Any], tools: Sequence[Any]
    ) -> dict[str, str]:
        used = set(self._text) | set(json.dumps([conversation, list(tools)], ensure_ascii=False))
        free = (chr(code) for code in range(_FIRST_PRIVATE, _LAST_PRIVATE + 1) if chr(code) not in used)
        marks = dict(zip(sorted(names), free, strict=False))
        if len(marks) < len(names):
            raise UsageError("the conversation uses too many private-use characters")
        return marks

    def _run(
        self, conversation: list[Any], tools: list[Any], more: Mapping[str, Any], add_generation_prompt: bool
    ) -> str:
        context: dict[str, Any] = {
            **self._variables,
            **dict.fromkeys(_ARGUMENTS),
            **more,
            "messages": conversation,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._ask({"context": context})
        if "text" in answer:
            return str(answer["text"])
        message = " ".join(str(answer["message"]).split())[:300]
        if answer["fault"] == "refusal":
            raise TemplateRefusal(f"the chat template refuses this conversation: {message}")
        raise CorruptCheckpoint(f"{self._source}: {message}")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        limits = self._limits
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = self._started()
            try:
                answer = self._worker.ask(request)
            except ConfinedFailure as failure:
                causes = {
                    "time": f"took longer than {limits.seconds:g} s",
                    "memory": f"needs more than {limits.memory_bytes >> 20} MiB of memory",
                    "broken": "broke the process that renders it",
                }
                return {"fault": "limit", "message": f"the chat template {causes[failure.cause]}"}
        if answer.get("fault") == "output":
            return {"fault": "limit", "message": f"the chat template makes {answer['message']}"}
        return answer

    def _started(self) -> ConfinedProcess:
        limits = self._limits
        confined = ConfinedLimits(
            seconds=limits.seconds,
            cpu_seconds=limits.seconds,
            memory_bytes=limits.memory_bytes,
            answer_bytes=12 * limits.output_characters + 65536,  # a character is at most 12 bytes of ASCII JSON
        )
        try:
            return ConfinedProcess(
                _WORKER, confined, setup={"source": self._text, "output_characters": limits.output_characters}
            )
        except OSError:
            raise CorruptCheckpoint("the process that renders chat templates did not start") from None


class _MarkNames:
    """Replaces the given names by their marks in all strings of a JSON value, keys included."""

    def __init__(self, marks: Mapping[str, str], names: Collection[str]) -> None:
        self._marks = marks
        self._pattern = _names_pattern(names)

    def value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._marks[match.group()], value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {key: item if key == "role" else self.value(item) for key, item in message.items()}


def _names_pattern(names: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _names_inside(value: Any, names: Collection[str]) -> bool:
    pattern = _names_pattern(names)
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if pattern.search(item):
                return True
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
    return False


def _split_at_marks(text: str, names_by_mark: Mapping[str, str]) -> list[Piece]:
    pieces: list[Piece] = []
    start = 0
    for match in re.finditer("[" + "".join(names_by_mark) + "]", text):
        if match.start() > start:
            pieces.append(Piece(text[start : match.start()], True))
        pieces.append(Piece(names_by_mark[match.group()], False))
        start = match.end()
    if start < len(text):
        pieces.append(Piece(text[start:], True))
    return pieces
