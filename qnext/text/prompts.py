"""A conversation to token ids. No other code does this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qnext.text.chat import ChatFormat
from qnext.text.confined_tokenizer import Watch
from qnext.text.messages import Message
from qnext.text.thinking import (
    THINK,
    THINK_END,
    TemplateRequest,
    ThoughtState,
    is_hybrid,
    state_of_beginning,
    thought_state,
)
from qnext.text.tokenizer import Piece, Tokenizer


class EncodedPrompt(NamedTuple):
    """`thought` says in which state the prompt leaves the thought of the answer."""

    token_ids: list[int]
    thought: ThoughtState


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, and how it is to be written.

    `continues`: the last message is the beginning of the answer. Where no thought is wanted but the template opens one,
    the thought is closed, unless the answer has begun.
    """

    messages: Sequence[Message]
    asked: TemplateRequest = field(default_factory=TemplateRequest)
    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continues: bool = False

    def encode(self, chat_format: ChatFormat, tokenizer: Tokenizer, *, watch: Watch | None = None) -> EncodedPrompt:
        """Token ids; no string of the caller becomes a control token.

        Raises UsageError as `ChatFormat.render` and `TemplateRequest.for_template` do, and what `watch` raises.
        """
        if chat_format.template is None:
            tokenizer.require_chat_tokens()
        pieces, thought = self.pieces(chat_format, tokenizer)
        return EncodedPrompt(tokenizer.encode_pieces(pieces, watch=watch), thought)

    def pieces(self, chat_format: ChatFormat, tokenizer: Tokenizer) -> tuple[list[Piece], ThoughtState]:
        """The text of which `encode` makes token ids."""
        return self._pieces(chat_format, may_open=is_hybrid(chat_format, tokenizer))

    def _pieces(self, chat_format: ChatFormat, *, may_open: bool) -> tuple[list[Piece], ThoughtState]:
        """`may_open`: an answer that has begun may begin with a thought that the format does not open."""
        if not self.continues:
            pieces, thought = self._render(chat_format, self.messages, opens=self.add_generation_prompt)
            if thought == "open" and self.asked.wants_thought is False:
                return [*pieces, Piece(f"\n{THINK_END}\n\n", True)], "closed"
            return pieces, thought
        *before, begun = self.messages
        pieces, thought = self._render(chat_format, before, opens=True)
        begins, thought = _beginning(begun, thought, may_open=may_open)
        return [*pieces, *begins], thought

    def _render(
        self, chat_format: ChatFormat, messages: Sequence[Message], *, opens: bool
    ) -> tuple[list[Piece], ThoughtState]:
        """`opens`: what is written ends with the head of the assistant's turn."""
        arguments = self.asked.for_template(chat_format.arguments)
        pieces = chat_format.render(messages, tools=self.tools, add_generation_prompt=opens, arguments=arguments)
        return pieces, thought_state(pieces) if opens else "possible"


def thought_of_format(chat_format: ChatFormat, asked: TemplateRequest | None = None) -> ThoughtState:
    """The state in which the format leaves the thought of the answer to a plain question. Raises QnextError where it
    fails."""
    question = ChatPrompt([Message("user", "Hello")], asked or TemplateRequest())
    return question._pieces(chat_format, may_open=False)[1]


def _beginning(begun: Message, state: ThoughtState, *, may_open: bool) -> tuple[list[Piece], ThoughtState]:
    """What stands behind the head of a turn that the caller has begun, and where that leaves the thought."""
    text, thought = begun.content, (begun.reasoning_content or "").strip("\n")
    if state == "open" and not thought and text.lstrip().startswith(THINK):
        text = text.lstrip().removeprefix(THINK).lstrip("\n")
        return [Piece(text, False)], "closed" if THINK_END in text else "open"
    if state == "open" or (state == "possible" and thought and may_open):
        head = [] if state == "open" else [Piece(f"{THINK}\n", True)]
        closing = [Piece(thought, False), Piece(f"\n{THINK_END}\n\n", True)]
        return [*head, *closing, Piece(text, False)], "closed"
    return [Piece(text, False)], state_of_beginning(text, state)
