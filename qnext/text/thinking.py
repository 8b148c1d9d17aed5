"""Thoughts: what a caller asks for, which arguments of a chat template express it, and the state after the prompt."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from qnext.errors import UsageError
from qnext.text.tokenizer import Piece, Tokenizer
from qnext.text.train import IM_START

THINK, THINK_END = "<think>", "</think>"

# Arguments of chat templates that switch thoughts: true thinks, false does not.
SWITCHES = ("enable_thinking", "thinking")
EFFORT, BUDGET = "reasoning_effort", "thinking_budget"
# Known of every model: they say whether it thinks, where the template does not read them as well.
KNOWN_ARGUMENTS = MappingProxyType(
    {
        "enable_thinking": "whether the answer begins with a thought",
        "thinking": "the same, by its other name",
        EFFORT: "none and minimal: no thought; other words reach a template that reads them",
        BUDGET: "tokens of the thought, for a template that reads it; without effect elsewhere",
    }
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_WITHOUT_THOUGHT = EFFORTS[:2]
# What the caller's side gives: the request has fields of its own for it.
NOT_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")

if TYPE_CHECKING:
    from qnext.text.chat import ChatFormat

ThoughtState = Literal["open", "possible", "closed"]


@dataclass(frozen=True)
class TemplateRequest:
    """What a caller asks of the chat template beside the conversation.

    `arguments` are the template's arguments by name. `thinks`, `effort` and `budget` (tokens) reach the arguments that
    the template reads. An argument counts before `thinks`, and `thinks` before `effort`.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    thinks: bool | None = None
    effort: str | None = None
    budget: int | None = None

    def over(self, defaults: Mapping[str, Any]) -> TemplateRequest:
        """The same request with arguments of the server, which count only where this request sets nothing."""
        silent = {name: value for name, value in defaults.items() if name not in self.arguments}
        if self.thinks is not None or self.effort is not None:
            silent = {name: value for name, value in silent.items() if name not in (*SWITCHES, EFFORT)}
        return TemplateRequest({**silent, **self.arguments}, self.thinks, self.effort, self.budget)

    @property
    def wants_thought(self) -> bool | None:
        """Whether the answer shall begin with a thought; None where the model decides."""
        for name in SWITCHES:
            if isinstance(value := self.arguments.get(name), bool):
                return value
        if self.thinks is not None:
            return self.thinks
        effort = self.arguments.get(EFFORT, self.effort)
        return None if effort is None else effort not in _WITHOUT_THOUGHT

    def without_effect(self, read: Collection[str], state: ThoughtState) -> list[str]:
        """What the request says about thoughts without any effect: names of KNOWN_ARGUMENTS, whatever field was used.

        `read` are the names that the template reads. `state` is the state in which the prompt left the thought. A wish
        for no thought always has an effect, because a thought that the prompt opens is closed.
        """
        arguments = {name: value for name, value in self.arguments.items() if value is not None}
        found: list[str] = []
        if BUDGET not in read and (BUDGET in arguments or self.budget is not None):
            found.append(BUDGET)
        if not self.wants_thought or state == "open" or not set(read).isdisjoint((*SWITCHES, EFFORT)):
            return found
        switches = [name for name in SWITCHES if isinstance(arguments.get(name), bool)]
        if switches or self.thinks is not None:
            return [*found, *(switches or SWITCHES[:1])]
        return [*found, EFFORT]

    def for_template(self, read: Collection[str]) -> dict[str, Any]:
        """The arguments of a template that reads these names.

        Raises UsageError for one that it does not read, unless it is of KNOWN_ARGUMENTS, and for a switch that is
        neither true nor false.
        """
        given = {name: value for name, value in self.arguments.items() if value is not None}
        for name, value in given.items():
            if name in NOT_ARGUMENTS or (name not in read and name not in KNOWN_ARGUMENTS):
                known = ", ".join(sorted({*read, *KNOWN_ARGUMENTS} - {*NOT_ARGUMENTS}))
                raise UsageError(f"chat_template_kwargs: the chat template reads no argument {name!r}, only {known}")
            if name in SWITCHES and not isinstance(value, bool):
                raise UsageError(f"chat_template_kwargs: {name} must be true or false")
        wishes: dict[str, Any] = {EFFORT: self.effort, BUDGET: self.budget}
        wishes |= dict.fromkeys(SWITCHES, self.wants_thought)
        wanted = {name: value for name, value in wishes.items() if name in read and value is not None}
        return {**wanted, **{name: value for name, value in given.items() if name in read}}


def may_think(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has the marks of thoughts. Then every answer may begin with a thought, whatever the
    prompt."""
    return THINK in tokenizer.added_ids and THINK_END in tokenizer.added_ids


def thought_state(pieces: Sequence[Piece]) -> ThoughtState:
    """The state in which a prompt that ends with the head of the assistant's turn leaves the thought of the answer."""
    tail = "".join(piece.text for piece in pieces[-2:] if piece.is_trusted).rpartition(IM_START)[2]
    opened, closed = tail.rfind(THINK), tail.rfind(THINK_END)
    if opened == closed:
        return "possible"
    return "open" if opened > closed else "closed"


def is_hybrid(chat_format: ChatFormat | None, tokenizer: Tokenizer) -> bool:
    """Whether the template has a switch for thoughts. Where the switch is not set, the model decides."""
    return chat_format is not None and may_think(tokenizer) and not chat_format.arguments.isdisjoint(SWITCHES)


def state_of_beginning(text: str, state: ThoughtState) -> ThoughtState:
    """The same behind the beginning of an answer, which the caller has given."""
    begun = text.lstrip()
    if state == "possible" and begun.startswith(THINK):
        return "closed" if THINK_END in begun else "open"
    return "closed" if begun else state
