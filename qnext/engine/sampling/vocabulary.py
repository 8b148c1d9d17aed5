"""What the engine knows of text: the bytes of each token id, and which ids are no text. No torch."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.engine.sampling.matchers import MARKER
from qnext.errors import UsageError

Mask = NDArray[np.int32]


class Vocabulary:
    """The bytes of each token id, the ids that end an output, and those that are no text (added tokens).

    `size` is the number of rows of the model's head where it is more than the tokenizer's; the rows between are
    padding. Raises UsageError for ids outside of it, and without an end token.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        eos_ids: Collection[int],
        special_ids: Collection[int] = (),
        size: int | None = None,
    ) -> None:
        self.size = max(len(token_bytes), size or 0)
        self.eos_ids = frozenset(eos_ids)
        self.special_ids = frozenset(special_ids) | self.eos_ids
        if not self.eos_ids:
            raise UsageError("output cannot be constrained without an end token")
        if not all(0 <= token < self.size for token in self.special_ids):
            raise UsageError(f"end tokens and special tokens must be below the vocabulary size {self.size}")
        self.token_bytes = [*token_bytes, *([b""] * (self.size - len(token_bytes)))]
        usable = [
            bool(text) and (text[0] != MARKER or i in self.special_ids) for i, text in enumerate(self.token_bytes)
        ]
        self.eos_mask = self._mask([token in self.eos_ids for token in range(self.size)])
        self.text_mask = self._mask(usable) & ~self.eos_mask  # everything that may stand in an output

    @property
    def num_words(self) -> int:
        return (self.size + 31) // 32

    def packed(self) -> dict[str, Any]:
        """As values of JSON, from which a child process has it (`grammar_worker.unpacked_bytes`)."""
        lengths = array("I", map(len, self.token_bytes))
        return {
            "bytes": base64.b64encode(b"".join(self.token_bytes)).decode("ascii"),
            "lengths": base64.b64encode(lengths.tobytes()).decode("ascii"),
            "eos_ids": sorted(self.eos_ids),
            "special_ids": sorted(self.special_ids),
        }

    def _mask(self, flags: Sequence[bool]) -> Mask:
        bits = np.zeros(32 * self.num_words, dtype=np.uint8)
        bits[: self.size] = flags
        mask: Mask = np.packbits(bits, bitorder="little").view(np.int32)
        mask.flags.writeable = False
        return mask
