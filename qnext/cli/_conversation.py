"""A conversation with one model: turns, settings, answers. `chat` puts a prompt and commands around it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.engine import Engine, SamplingParams
    from qnext.text.chat import ChatFormat
    from qnext.text.messages import Message
    from qnext.text.tokenizer import Tokenizer

Write = Callable[[str], None]

_NOT_IN_CHAT = {
    "stop_token_ids", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "banned_token_ids", "n",
}  # fmt: skip


@dataclass
class Conversation:
    """What was said and how answers are sampled.

    Without `chat_format` nothing is remembered: each input is completed as plain text. With one, turns alternate
    user, assistant; an answer that was cut short stays as far as it came.
    """

    engine: Engine
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    params: SamplingParams
    stop: tuple[str, ...] = ()
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    last_input: str | None = None

    def answer(self, text: str, write: Write) -> str:
        """Take the user's input, stream the answer to `write` and keep both.

        Raises UsageError or DoesNotFit before anything is kept. Ctrl-C ends the answer, not the program.
        """
        return self._answer(text, self.turns, write)

    def regenerate(self, write: Write) -> str:
        """Answer the last input once more; the old answer is dropped."""
        if self.last_input is None:
            raise UsageError("there is nothing to answer again yet")
        return self._answer(self.last_input, self.turns[:-2], write)

    def _answer(self, text: str, history: list[Message], write: Write) -> str:
        from qnext.engine import TokenEvent
        from qnext.text.messages import Message
        from qnext.text.stream import TextStream

        turns = [*history, Message("user", text)]
        prompt_ids = self._prompt_ids(text, turns)
        stream = TextStream(self.tokenizer, stop=self.stop)
        request = self.engine.add_request(prompt_ids, self._capped(len(prompt_ids)))
        parts: list[str] = []

        def emit(piece: str) -> None:
            parts.append(piece)
            if piece:
                write(piece)

        try:
            with _interrupt_flag() as is_interrupted:
                while request.finish_reason is None and stream.stop_string is None and not is_interrupted():
                    for event in self.engine.step():
                        if isinstance(event, TokenEvent) and event.finish_reason != "stop":
                            emit(stream.push(event.token.token_id))
        finally:
            self.engine.abort(request.id)
        emit(stream.finish())
        answer = "".join(parts)
        self.last_input = text
        if self.chat_format is not None:
            self.turns = [*turns, Message("assistant", answer)]
        return answer

    def _capped(self, num_prompt: int) -> SamplingParams:
        """In a conversation max_tokens is a wish: near the end of the context the answer is as long as it can be."""
        wanted, room = self.params.max_tokens, self.engine.max_model_len - num_prompt
        return self.params if wanted is None or room < 1 else replace(self.params, max_tokens=min(wanted, room))

    def clear(self) -> None:
        self.turns, self.last_input = [], None

    def set_parameter(self, name: str, value: str) -> None:
        """Change one sampling parameter. Raises UsageError for an unknown name or an impossible value."""
        known = {item.name for item in fields(self.params)} - _NOT_IN_CHAT
        if name == "stop":
            self.stop = (value,) if value else ()
            return
        if name not in known:
            raise UsageError(f"no parameter {name!r}; known: {', '.join(sorted(known | {'stop'}))}")
        try:
            parsed = json.loads(value.lower().replace("none", "null"))
        except ValueError:
            raise UsageError(f"{name}: {value!r} is not a number") from None
        if (name == "ignore_eos") != isinstance(parsed, bool):
            raise UsageError(f"{name} must be {'true or false' if name == 'ignore_eos' else 'a number'}, not {value}")
        self.params = replace(self.params, **{name: parsed})

    def show(self) -> str:
        """Settings and length of the conversation, one per line."""
        names = [item.name for item in fields(self.params) if item.name not in _NOT_IN_CHAT]
        lines = [f"{name} {getattr(self.params, name)}" for name in names]
        lines += [f"stop {list(self.stop)}", f"system {self.system!r}"]
        kind = "completion, no memory" if self.chat_format is None else f"chat format {self.chat_format.name}"
        return "\n".join([*lines, kind, f"{len(self.turns)} turns, context of {self.engine.max_model_len} tokens"])

    def save(self, path: Path) -> None:
        """Write system text, turns and parameters as JSON; the file appears whole or not at all."""
        document = {
            "system": self.system,
            "messages": [{"role": turn.role, "content": turn.content} for turn in self.turns],
            "parameters": {item.name: getattr(self.params, item.name) for item in fields(self.params)},
        }
        if not path.name:
            raise UsageError(f"{path} is not a file name")
        temporary = path.with_name(path.name + ".partial")
        try:
            temporary.write_text(json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Take over a saved conversation. Raises UsageError naming the file and what is wrong; nothing changes then."""
        from qnext.engine import SamplingParams

        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not a saved conversation ({error})") from None
        try:
            system, turns = document["system"], _turns(document["messages"])
            values = dict(document["parameters"])
            params = SamplingParams(**values | {"stop_token_ids": tuple(values.get("stop_token_ids", ()))})
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: not a saved conversation ({error})") from None
        if system is not None and not isinstance(system, str):
            raise UsageError(f"{path}: system must be a text")
        self.system, self.turns, self.params = system, turns, params
        self.last_input = turns[-2].content if turns else None

    def _prompt_ids(self, text: str, turns: list[Message]) -> list[int]:
        from qnext.text.messages import Message

        if self.chat_format is None:
            return self.tokenizer.encode(text)
        head = [Message("system", self.system)] if self.system else []
        return self.chat_format.encode(self.tokenizer, [*head, *turns])


def _turns(entries: list[Any]) -> list[Message]:
    from qnext.text.messages import message_from_dict

    if not all(isinstance(entry, dict) for entry in entries):
        raise UsageError("messages must be objects")
    turns = [message_from_dict(entry) for entry in entries]
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise UsageError("messages must alternate user, assistant")
    return turns


def split_command(line: str) -> tuple[str, str]:
    """
    >>> split_command("/set system  Be brief.")
    ('/set', 'system  Be brief.')
    """
    name, _, rest = re.sub(r"\s+", " ", line.strip(), count=1).partition(" ")
    return name, rest.strip()


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """While open, the first Ctrl-C is only remembered; a second one interrupts as usual.

    A step of the engine is never torn apart by it. Signals belong to the main thread; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, previous)
