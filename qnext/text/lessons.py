"""A conversation to token ids of which some are learnt: what a model shall write, behind what it will then see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from qnext.errors import UsageError
from qnext.text.chat import ChatFormat
from qnext.text.messages import Message
from qnext.text.native import split_reasoning
from qnext.text.prompts import ChatPrompt
from qnext.text.thinking import THINK_END, TemplateRequest
from qnext.text.tokenizer import Piece, Tokenizer

Taught = Literal["assistant", "last", "whole"]
TAUGHT = ("assistant", "last", "whole")


class Lesson(NamedTuple):
    """Token ids, and for each whether it is learnt: predicted from those before it."""

    token_ids: list[int]
    is_learned: list[bool]


@dataclass(frozen=True)
class Teacher:
    """Makes lessons of conversations. `end_ids` are the tokens that end an answer.

    `taught` says what is learnt: the turns of the assistant, the last of them, or the whole conversation.
    """

    chat_format: ChatFormat
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    taught: Taught = "assistant"

    def lessons(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        is_taught: Sequence[bool] | None = None,
    ) -> list[Lesson]:
        """Each learnt turn stands behind exactly the ids that `ChatPrompt` makes of the messages before it.

        Turns share a lesson while that holds. Formats that write an earlier turn in another way than they ask for it,
        as those do that leave earlier thoughts out, give a lesson for each turn. `is_taught` leaves turns out by their
        index. No lesson where there is nothing to learn. Raises UsageError where the format asks for a turn with calls
        in another way than it writes it, or writes a turn without an end token.
        """
        if self.taught == "whole":
            ids = ChatPrompt(messages, tools=tools, add_generation_prompt=False).encode(
                self.chat_format, self.tokenizer
            )
            return [Lesson(ids.token_ids, [True] * len(ids.token_ids))]
        turns = [
            index
            for index, message in enumerate(messages)
            if message.role == "assistant" and (is_taught is None or is_taught[index])
        ]
        found: list[Lesson] = []
        for index in turns if self.taught == "assistant" else turns[-1:]:
            asked, answer = self._turn(messages[: index + 1], tools)
            if found and asked[: len(found[-1].token_ids)] == found[-1].token_ids:
                asked = asked[len(found[-1].token_ids) :]
            else:
                found.append(Lesson([], []))
            found[-1].token_ids.extend([*asked, *answer])
            found[-1].is_learned.extend([*[False] * len(asked), *[True] * len(answer)])
        return found

    def _turn(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """The ids that ask for the last message, and those that are to follow."""
        *before, answer = messages
        asked = TemplateRequest(thinks=bool(answer.reasoning_content) or THINK_END in answer.content)
        head = self._pieces(ChatPrompt(before, asked, tools))
        written = self._pieces(ChatPrompt(messages, asked, tools, add_generation_prompt=False))
        where, rest = f"message {len(before)}: the chat template", _behind(written, head)
        ids = self.tokenizer.encode_pieces(written if rest is None else rest)
        ends = [place for place, token in enumerate(ids) if token in self.end_ids]
        if not ends:
            raise UsageError(f"{where} writes this turn without an end token")
        if rest is None:  # it leaves out thoughts that it asks for
            rest = None if answer.tool_calls else _behind(self._pieces(self._begun(messages, asked, tools)), head)
            if rest is None:
                raise UsageError(f"{where} asks for this turn in another way than it writes it; what to learn is open")
            ids = [*self.tokenizer.encode_pieces(rest), ids[ends[-1]]]
            ends = [len(ids) - 1]
        return self.tokenizer.encode_pieces(head), ids[: ends[-1] + 1]

    def _pieces(self, prompt: ChatPrompt) -> list[Piece]:
        return prompt.pieces(self.chat_format, self.tokenizer)[0]

    def _begun(
        self, messages: Sequence[Message], asked: TemplateRequest, tools: Sequence[Mapping[str, Any]]
    ) -> ChatPrompt:
        """The last message as an answer that has begun."""
        *before, answer = messages
        thought, content = split_reasoning(answer)
        return ChatPrompt(
            [*before, replace(answer, content=content, reasoning_content=thought)], asked, tools, continues=True
        )


def _behind(pieces: Sequence[Piece], head: Sequence[Piece]) -> list[Piece] | None:
    """What follows `head` in `pieces`; None where they do not begin with it."""
    begin = "".join(piece.text for piece in head)
    if not "".join(piece.text for piece in pieces).startswith(begin):
        return None
    found: list[Piece] = []
    left = len(begin)
    for text, is_trusted in pieces:
        if len(text) > left:
            found.append(Piece(text[left:], is_trusted))
        left = max(0, left - len(text))
    return found
