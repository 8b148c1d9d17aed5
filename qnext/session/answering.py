"""The text of one request, made from its tokens as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext.engine import FinishReason, SampledToken, TokenEvent
    from qnext.text.stream import TextStream


class Answering:
    """The text of a request so far. A stop string ends it in the same way as a stop token."""

    def __init__(self, stream: TextStream) -> None:
        self.text = ""
        self.tokens: list[SampledToken] = []
        self.finish_reason: FinishReason | None = None
        self._stream = stream

    def take(self, event: TokenEvent) -> str:
        """Add a token; returns the text that it adds."""
        self.tokens.append(event.token)
        text = "" if event.finish_reason == "stop" else self._stream.push(event.token.token_id)
        self.finish_reason = event.finish_reason if self._stream.stop_string is None else "stop"
        if self.finish_reason is not None:
            text += self._stream.finish()
        self.text += text
        return text
