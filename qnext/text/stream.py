"""Token ids to text for a reader: whole characters as early as possible, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qnext.errors import UsageError
from qnext.text.tokenizer import IncrementalDecoder, Tokenizer

Thought = Literal["open", "possible"]
_THINK, _THINK_END = "<think>", "</think>"


class TextStream:
    """The text of one answer, piece by piece: `push` token ids, `finish` at the end.

    A stop string may span tokens, so text that could be its beginning is held back until this is decided. The text ends
    before the stop string that begins first (of two that begin together, the one completed first). Then `stop_string`
    is set and the caller ends the request. Stop strings are not searched in the `thought` at the beginning of the
    answer: "open" where the prompt opened it, "possible" where the answer may open it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        thought: Thought | None = None,
        skip_special: bool = True,
    ) -> None:
        if any(not text for text in stop):
            raise UsageError("a stop string must not be empty")
        self._stop = tuple(stop)
        self._decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        self._held = ""
        self._thought = thought if stop else None
        self._unread = ""  # text of which it is not known whether it is of the thought
        self.stop_string: str | None = None

    def push(self, token_id: int) -> str:
        """Text that is certain after `token_id`; nothing after a stop string."""
        return self._read(self._decoder.push(token_id))

    def finish(self) -> str:
        """The text that was held back, when the answer ends without a stop string."""
        text = self._read(self._decoder.flush())
        if self._thought == "possible":
            self._thought = None
            text += self._take(self._unread)
        else:
            text += self._unread
        text += self._held
        self._unread = self._held = ""
        return text

    def _read(self, text: str) -> str:
        """Pass a thought through, and look for stop strings behind it."""
        if self._thought is None:
            return self._take(text)
        text = self._unread + text
        self._unread = ""
        if self._thought == "possible":
            begun = text.lstrip()
            if not begun.startswith(_THINK):
                if _THINK.startswith(begun):
                    self._unread = text
                    return ""
                self._thought = None
                return self._take(text)
            self._thought = "open"
        place = text.find(_THINK_END)
        if place >= 0:
            self._thought = None
            place += len(_THINK_END)
            return text[:place] + self._take(text[place:])
        keep = _overlap(text, _THINK_END)
        self._unread = text[len(text) - keep :]
        return text[: len(text) - keep]

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
