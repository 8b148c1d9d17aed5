"""Thoughts: what a caller wants of them, which arguments of a chat template say it, and where a prompt leaves them."""

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
    from qnext.text.messages import Message

ThoughtState = Literal["open", "possible", "closed"]


@dataclass(frozen=True)
class TemplateRequest:
    """What a caller says to the chat template beside the conversation.

    `arguments` are the template's by name. `thinks`, `effort` and `budget` (tokens) are wishes that reach whatever
    the template reads of them; an argument counts before `thinks`, and that before `effort`.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    thinks: bool | None = None
    effort: str | None = None
    budget: int | None = None

    def over(self, defaults: Mapping[str, Any]) -> TemplateRequest:
        """The same request where the server has arguments of its own, which count only where this one is silent."""
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
        """What was said of thoughts and changes nothing: names of KNOWN_ARGUMENTS, whatever field said it.

        `read` are the names that the template reads, and `state` is where the prompt left the thought. A wish for no
        thought is met: one that the prompt opens is closed.
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
    """Whether the vocabulary has the marks of thoughts: then an answer may begin with one, whatever the prompt."""
    return THINK in tokenizer.added_ids and THINK_END in tokenizer.added_ids


def thought_state(pieces: Sequence[Piece]) -> ThoughtState:
    """Where a prompt that ends in the head of the assistant's turn leaves the thought of the answer."""
    tail = "".join(piece.text for piece in pieces[-2:] if piece.is_trusted).rpartition(IM_START)[2]
    opened, closed = tail.rfind(THINK), tail.rfind(THINK_END)
    if opened == closed:
        return "possible"
    return "open" if opened > closed else "closed"


def prompt_pieces(
    chat_format: ChatFormat,
    messages: Sequence[Message],
    asked: TemplateRequest,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
    closes: bool = True,
) -> tuple[list[Piece], ThoughtState]:
    """(the pieces of a prompt, where it leaves the thought of the answer).

    Where no thought is wanted, and the template opens one all the same, it is closed, if `closes`. Raises UsageError as
    `ChatFormat.render` and `TemplateRequest.for_template` do.
    """
    values = asked.for_template(chat_format.arguments)
    pieces = chat_format.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, arguments=values)
    state = thought_state(pieces) if add_generation_prompt else "possible"
    if state == "open" and closes and asked.wants_thought is False:
        return [*pieces, Piece(f"\n{THINK_END}\n\n", True)], "closed"
    return pieces, state


def is_hybrid(chat_format: ChatFormat | None, tokenizer: Tokenizer) -> bool:
    """Whether the template has a switch for thoughts, so that the model decides where it is not set."""
    return chat_format is not None and may_think(tokenizer) and not chat_format.arguments.isdisjoint(SWITCHES)


def state_of_beginning(text: str, state: ThoughtState) -> ThoughtState:
    """The same behind the beginning of an answer, which the caller has given."""
    begun = text.lstrip()
    if state == "possible" and begun.startswith(THINK):
        return "closed" if THINK_END in begun else "open"
    return "closed" if begun else state
