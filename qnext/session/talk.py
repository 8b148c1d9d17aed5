"""What every conversation of `qnext chat` has, wherever its model runs: turns, settings, commands. No torch."""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnext.errors import UsageError
from qnext.files import write_file
from qnext.session.answer_reads import AnswerReads
from qnext.text.messages import Message, message_from_dict

DEFAULT_MAX_TOKENS = 256  # of a completion, where nobody says how many
Write = Callable[[str], None]


def drop(text: str) -> None:
    """Ignores a text."""


@dataclass(frozen=True)
class ChatReply:
    """An answer. `reasoning` is None where the model does not think."""

    content: str
    reasoning: str | None = None


@dataclass
class Stopwatch:
    """Times of one answer. It starts when it is made."""

    num_tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    reads: AnswerReads | None = None  # of experts on disk

    @property
    def seconds(self) -> tuple[float, float]:
        """To the first token, and from there to the last one."""
        first, last = self.first or self.began, self.last or self.began
        return first - self.began, last - first

    def tick(self, num_tokens: int = 1) -> None:
        """Note that tokens came now."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.num_tokens += num_tokens

    def describe(self) -> str:
        """Time to the first token, tokens per second of the others; a second line about experts on disk."""
        if self.first is None:
            return "no token"
        before, after = self.seconds
        rate = f", {(self.num_tokens - 1) / after:.1f} tokens/s" if self.num_tokens > 1 and after > 0 else ""
        reads = "" if self.reads is None else f"\n{self.reads.describe()}"
        return f"first token after {before:.2f} s; {self.num_tokens} tokens{rate}{reads}"


@dataclass(kw_only=True)
class Talk(ABC):
    """The turns of a conversation, and how its answers are sampled.

    Where `remembers` is false, each input is completed as plain text. Otherwise turns alternate between user and
    assistant. An answer that was interrupted is kept as far as it came.
    """

    stop: tuple[str, ...] = ()
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    last_input: str | None = None
    thinks: bool | None = None  # None: as the model does by itself
    template_arguments: Mapping[str, Any] = field(default_factory=dict)  # `thinks` counts where they are silent
    wants_json: bool = False
    shows_stats: bool = False
    stopwatch: Stopwatch | None = None  # of the last answer

    # ---- what each kind does in its own way ----

    @property
    @abstractmethod
    def remembers(self) -> bool:
        """Whether this is a conversation, and not the completion of plain text."""

    @abstractmethod
    def _ask(self, text: str, turns: list[Message], write: Write, write_thought: Write) -> ChatReply:
        """Stream the answer to the last of `turns`, or the completion of `text`; Ctrl-C ends it early."""

    @abstractmethod
    def set_parameter(self, name: str, value: str) -> None:
        """Change one sampling parameter. Raises UsageError for an unknown name or an impossible value."""

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Sampling parameters by name, in the form in which they are shown and saved."""

    @abstractmethod
    def _read_parameters(self, values: dict[str, Any]) -> Callable[[], None]:
        """Check parameters of a saved conversation; what is returned puts them to use.

        Raises UsageError, TypeError or ValueError.
        """

    @abstractmethod
    def info(self) -> list[str]:
        """Lines about the model."""

    # ---- what all do alike ----

    def answer(self, text: str, write: Write, write_thought: Write = drop) -> str:
        """Take the user's input, stream the answer to `write`, and keep both. Returns the answer without its thought.

        Raises UsageError or DoesNotFit before anything is kept. Ctrl-C ends the answer, not the program.
        """
        return self._answer(text, self.turns, write, write_thought)

    def regenerate(self, write: Write, write_thought: Write = drop) -> str:
        """Answer the last input once more. The old answer is dropped."""
        if self.last_input is None:
            raise UsageError("there is nothing to answer again yet")
        return self._answer(self.last_input, self.turns[:-2], write, write_thought)

    def _answer(self, text: str, history: list[Message], write: Write, write_thought: Write) -> str:
        turns = [*history, Message("user", text)]
        reply = self._ask(text, turns, write, write_thought)
        self.last_input = text
        if self.remembers:
            self.turns = [*turns, Message("assistant", reply.content, reply.reasoning)]
        return reply.content

    def set_thinking(self, thinks: bool) -> None:
        """Choose whether answers begin with a thought. Raises UsageError where the model is known to have no
        thoughts."""
        self.thinks = thinks

    def change(self, rest: str) -> None:
        """Change the setting that the words name, such as `parameter seed 1`. Raises UsageError for unknown words."""
        what, value = split_command(rest)
        if what == "system":
            if not self.remembers:
                raise UsageError("a system message needs a chat format")
            self.system = value or None
        elif what == "parameter":
            self.set_parameter(*split_command(value))
        elif what in ("think", "nothink") and not value:
            self.set_thinking(what == "think")
        elif what == "format" and value in ("json", "text"):
            self.wants_json = value == "json"
        elif what in ("verbose", "quiet") and not value:
            self.shows_stats = what == "verbose"
        else:
            raise UsageError("usage: /set parameter NAME VALUE, and others; /help lists them")

    def clear(self) -> None:
        self.turns, self.last_input = [], None

    def show(self, what: str = "") -> str:
        """Settings and length of the conversation, one per line. `what` is one of info, parameters, system, or all."""
        parameters = {**self.parameters(), "stop": list(self.stop)}
        parts = {
            "parameters": [f"{name} {value}" for name, value in parameters.items()],
            "system": [f"system {self.system!r}"],
            "info": [*self.info(), f"{len(self.turns)} turns"],
        }
        if what and what not in parts:
            raise UsageError(f"usage: /show, or /show {'|'.join(sorted(parts))}")
        return "\n".join(line for name, lines in parts.items() if what in ("", name) for line in lines)

    def save(self, path: Path) -> None:
        """Write system text, turns and parameters as JSON. The file appears whole or not at all."""
        document = {
            "system": self.system,
            "messages": [_saved(turn) for turn in self.turns],
            "parameters": self.parameters(),
        }
        if not path.name:
            raise UsageError(f"{path} is not a file name")
        write_file(path, json.dumps(document, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: Path) -> None:
        """Take over a saved conversation. Raises UsageError naming the file and the fault; then nothing changes."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: not a saved conversation ({error})") from None
        try:
            system, turns = document["system"], _turns(document["messages"])
            use_parameters = self._read_parameters(dict(document["parameters"]))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: not a saved conversation ({error})") from None
        if system is not None and not isinstance(system, str):
            raise UsageError(f"{path}: system must be a text")
        use_parameters()
        self.system, self.turns = system, turns
        self.last_input = turns[-2].content if turns else None


def _saved(turn: Message) -> dict[str, str]:
    thought = {} if turn.reasoning_content is None else {"reasoning_content": turn.reasoning_content}
    return {"role": turn.role, "content": turn.content, **thought}


def _turns(entries: list[Any]) -> list[Message]:
    if not all(isinstance(entry, dict) for entry in entries):
        raise UsageError("messages must be objects")
    turns = [message_from_dict(entry) for entry in entries]
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise UsageError("messages must alternate user, assistant")
    return turns


def parameter_value(name: str, value: str) -> Any:
    """The value of a parameter that a user typed: a number, or true and false for ignore_eos. Raises UsageError."""
    try:
        parsed = json.loads(value.lower().replace("none", "null"))
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not a number") from None
    if (name == "ignore_eos") != isinstance(parsed, bool):
        raise UsageError(f"{name} must be {'true or false' if name == 'ignore_eos' else 'a number'}, not {value}")
    return parsed


def split_command(line: str) -> tuple[str, str]:
    """
    >>> split_command("/set system  Be brief.")
    ('/set', 'system  Be brief.')
    """
    name, _, rest = re.sub(r"\s+", " ", line.strip(), count=1).partition(" ")
    return name, rest.strip()
