"""Token ids to text for a reader: whole characters as early as possible, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from qnext.errors import UsageError
from qnext.text.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """Text of one answer, piece by piece.

    A stop string may span tokens: what could be its beginning is held back until it is decided. The text ends before
    the stop string that begins first (of two that begin together the one completed first); `stop_string` is then set
    and the caller ends the request.

    >>> stream = TextStream(tokenizer, stop=["User:"])
    >>> stream.push(token_of("Hello Us")), stream.push(token_of("er:")), stream.stop_string
    ('Hello ', '', 'User:')
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special: bool = True) -> None:
        if any(not text for text in stop):
            raise UsageError("a stop string must not be empty")
        self._stop = tuple(stop)
        self._decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        self._held = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> str:
        """Text that is certain after `token_id`; nothing after a stop string."""
        return self._take(self._decoder.push(token_id))

    def finish(self) -> str:
        """What was held back, when the answer ends otherwise than by a stop string."""
        text = self._take(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _take(self, text: str) -> str:
        if self.stop_string is not None:
            return ""
        if not self._stop:
            return text
        held = self._held + text
        found = [(held.find(stop), stop) for stop in self._stop if stop in held]
        if found:
            place, self.stop_string = min(found, key=lambda entry: (entry[0], len(entry[1])))
            self._held = ""
            return held[:place]
        keep = max(_overlap(held, stop) for stop in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
