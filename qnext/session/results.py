"""The results that an `LLM` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext.engine import FinishReason, SampledToken


@dataclass(frozen=True)
class GeneratedText:
    """The completion of a prompt.

    `tokens` has each token, with log-probabilities where they were asked for. Where a token ended the text, it is the
    last one. `finish_reason` is "stop" also after a stop string; `text` does not contain the stop string. The same
    prompt, parameters and `seed` give the same text again.
    """

    text: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason
    seed: int
    num_prompt_tokens: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


@dataclass(frozen=True)
class ChatAnswer:
    """An answer in a conversation: its content, and the thought before it or None."""

    content: str
    reasoning: str | None
    generated: GeneratedText

    @property
    def message(self) -> dict[str, str]:
        """The answer as the next message of the conversation."""
        thought = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        return {"role": "assistant", "content": self.content, **thought}


@dataclass(frozen=True)
class TextPiece:
    """The next piece of an answer. The last piece has a `finish_reason`, and often no text."""

    text: str
    is_reasoning: bool = False
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class TextScore:
    """How likely a model finds a text: a log-probability in nats for each token, None for the first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]

    @property
    def total(self) -> float:
        """The sum over all tokens but the first, in nats."""
        return sum(value for value in self.logprobs if value is not None)
