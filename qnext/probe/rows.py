"""Which tokens of which sequences are meant.

Legend: T tokens, N sequences, R rows that are chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from qnext.model import Batch
from qnext.ops import Packing

SequenceName: TypeAlias = str | int


class BatchRows:
    """The tokens of one call of the model: their positions, and the names of their sequences.

    A sequence has the name that its slot was given, or else the number of the slot. Without a cache it has the number
    of its place in the batch.
    """

    def __init__(
        self, positions_T: Tensor, packing: Packing, slots_N: Tensor | None, names: Mapping[int, SequenceName]
    ) -> None:
        self.positions_T, self.packing = positions_T, packing
        self._slots_N = slots_N
        self._names = dict(names)  # a slot may have another sequence soon
        self._chosen: dict[Where, Tensor] = {}

    @staticmethod
    def of(batch: Batch, names: Mapping[int, SequenceName]) -> BatchRows:
        return BatchRows(batch.positions_T, batch.packing, None if batch.cache is None else batch.cache.slots_N, names)

    def as_now(self, names: Mapping[int, SequenceName]) -> BatchRows:
        """Of a batch whose memory was filled anew: what it holds now. Its sequences may have other lengths."""
        packing = self.packing
        if packing.num_tokens > packing.num_sequences:
            starts = packing.cu_seqlens.tolist()
            packing = Packing([end - start for start, end in pairwise(starts)], device=packing.device)
        slots_N = None if self._slots_N is None else self._slots_N.clone()
        return BatchRows(self.positions_T.clone(), packing, slots_N, names)

    @cached_property
    def names(self) -> tuple[SequenceName, ...]:
        if self._slots_N is None:
            return tuple(range(self.packing.num_sequences))
        return tuple(self._names.get(slot, slot) for slot in self._slots_N.tolist())

    @cached_property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.positions_T.tolist())

    def sequence_of(self, row: int) -> SequenceName:
        return self.names[int(self.packing.sequence_ids_T[row])]

    def chosen(self, where: Where) -> Tensor | None:
        """[R] rows, or None for all of them."""
        if where.is_everything:
            return None
        if where not in self._chosen:
            self._chosen[where] = self._choose(where)
        return self._chosen[where]

    def _choose(self, where: Where) -> Tensor:
        packing = self.packing
        if where.sequences is None and where.positions is None:
            return packing.last_tokens_N
        rows, start = [], 0
        for name, length in zip(self.names, packing.lengths, strict=True):
            if where.sequences is None or name in where.sequences:
                own = range(start + length - 1, start + length) if where.is_last else range(start, start + length)
                rows += [row for row in own if where.positions is None or self.positions[row] in where.positions]
            start += length
        return torch.tensor(rows, dtype=torch.long, device=packing.device)


@dataclass(frozen=True)
class Where:
    """A choice of tokens: at these positions, of these sequences, the last ones of a call alone. None: all."""

    positions: frozenset[int] | range | None = None
    sequences: frozenset[SequenceName] | None = None
    is_last: bool = False

    @staticmethod
    def at(*positions: int, sequences: Collection[SequenceName] | None = None) -> Where:
        return Where(frozenset(positions), None if sequences is None else frozenset(sequences))

    @staticmethod
    def of(*sequences: SequenceName) -> Where:
        return Where(sequences=frozenset(sequences))

    @property
    def is_everything(self) -> bool:
        return self.positions is None and self.sequences is None and not self.is_last


EVERYWHERE = Where()
LAST = Where(is_last=True)
