"""The packed layout: the tokens of several sequences one after another, and the index maps that ops derive from it.

Shapes: T tokens of all sequences, N sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_SHORT = 31  # Sequences of up to so many tokens are padded together.


class ChunkLayout(NamedTuple):
    """Where packed tokens lie when every sequence is cut into chunks of C tokens, the last one padded.

    Chunks are sorted by their number within the sequence and then by sequence, longest sequence first. The chunks of
    the s-th step of a state pass are the contiguous rows `starts[s] : starts[s + 1]`. They belong to the first
    `starts[s + 1] - starts[s]` sequences of `order`.
    """

    rows: Tensor  # [T] row of each packed token among num_chunks * C
    order: Tensor  # [N] sequence indices, longest first
    starts: tuple[int, ...]  # [steps + 1]
    is_full: bool  # no padding anywhere

    @property
    def num_chunks(self) -> int:
        return self.starts[-1]


class Chunks(NamedTuple):
    """Pieces of at most C tokens, each sequence cut from its beginning, in the order of the tokens: B of them."""

    of_sequences_N1: Tensor  # [N + 1] the first chunk of each sequence, and their number
    tokens_B: Tensor  # first token of each chunk
    lengths_B: Tensor


class Packing:
    """Lengths of packed sequences. An index map is made once, when an op first asks for it.

    >>> Packing([2, 3]).cu_seqlens.tolist()
    [0, 2, 5]
    """

    def __init__(self, lengths: Sequence[int], *, device: torch.device | str | None = None) -> None:
        assert all(length > 0 for length in lengths), "an empty sequence cannot be packed"
        self.lengths = tuple(lengths)
        self.device = torch.device(device or "cpu")
        self._chunk_layouts: dict[int, ChunkLayout] = {}
        self._chunks: dict[int, Chunks] = {}
        self._extended: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @cached_property
    def is_uniform(self) -> bool:
        return all(length == self.lengths[0] for length in self.lengths)

    @cached_property
    def lengths_N(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.long, device=self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] offsets of the sequences, as variable-length kernels want them."""
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        return torch.cat([zero, self.lengths_N.cumsum(0)])

    @cached_property
    def sequence_ids_T(self) -> Tensor:
        """[T] the sequence of each token."""
        numbers_N = torch.arange(self.num_sequences, device=self.device)
        return torch.repeat_interleave(numbers_N, self.lengths_N, output_size=self.num_tokens)  # else a GPU is asked

    @cached_property
    def offsets_T(self) -> Tensor:
        """[T] the position of each token within its sequence, from zero."""
        return torch.arange(self.num_tokens, device=self.device) - self.cu_seqlens[self.sequence_ids_T]

    @cached_property
    def last_tokens_N(self) -> Tensor:
        """[N] row of the last token of each sequence."""
        return self.cu_seqlens[1:] - 1

    @cached_property
    def padded_groups(self) -> tuple[Tensor, ...]:
        """[n, l] each: rows of the packed tokens of n sequences, padded to their longest by repeating their last token.

        Every sequence is in one group. The longest of a group has less than twice the length of its others.
        """
        return tuple(self._padded(members) for members in self._similar)

    @cached_property
    def _similar(self) -> tuple[list[int], ...]:
        groups: dict[int, list[int]] = {}
        for n, length in enumerate(self.lengths):
            groups.setdefault(max(length, _SHORT).bit_length(), []).append(n)
        return tuple(groups.values())

    def _padded(self, members: list[int]) -> Tensor:
        members_N = torch.tensor(members, dtype=torch.long, device=self.device)
        offsets_L = torch.arange(max(self.lengths[n] for n in members), device=self.device)
        return self.cu_seqlens[members_N][:, None] + torch.minimum(offsets_L, self.lengths_N[members_N][:, None] - 1)

    @cached_property
    def grouped_rows_T(self) -> Tensor:
        """[T] the place of each token among the rows of all `padded_groups`, one group after another."""
        starts = [0] * self.num_sequences
        num_rows = 0
        for members in self._similar:
            longest = max(self.lengths[n] for n in members)
            for n in members:
                starts[n] = num_rows
                num_rows += longest
        return torch.tensor(starts, device=self.device)[self.sequence_ids_T] + self.offsets_T

    def extended_rows(self, extra: int) -> tuple[Tensor, Tensor]:
        """Rows in a layout with `extra` rows of history before each sequence, T + N * extra rows in all.

        Returns ([T] row of each token, [N, extra] rows of each sequence's history).
        """
        if extra not in self._extended:
            rows_T = torch.arange(self.num_tokens, device=self.device) + (self.sequence_ids_T + 1) * extra
            starts_N = self.cu_seqlens[:-1] + torch.arange(self.num_sequences, device=self.device) * extra
            self._extended[extra] = (rows_T, starts_N[:, None] + torch.arange(extra, device=self.device))
        return self._extended[extra]

    def chunks(self, chunk_size: int) -> Chunks:
        """The chunks of `chunk_size` tokens; see Chunks."""
        if chunk_size not in self._chunks:
            starts, firsts, lengths, first = [0], [], [], 0
            for length in self.lengths:
                offsets = range(0, length, chunk_size)
                firsts += [first + offset for offset in offsets]
                lengths += [min(chunk_size, length - offset) for offset in offsets]
                starts.append(len(firsts))
                first += length
            numbers = (torch.tensor(x, dtype=torch.long, device=self.device) for x in (starts, firsts, lengths))
            self._chunks[chunk_size] = Chunks(*numbers)
        return self._chunks[chunk_size]

    def chunk_layout(self, chunk_size: int) -> ChunkLayout:
        """The layout for chunks of `chunk_size` tokens; see ChunkLayout."""
        if chunk_size not in self._chunk_layouts:
            self._chunk_layouts[chunk_size] = self._make_chunk_layout(chunk_size)
        return self._chunk_layouts[chunk_size]

    def _make_chunk_layout(self, chunk_size: int) -> ChunkLayout:
        num_chunks = [-(-length // chunk_size) for length in self.lengths]
        order = sorted(range(len(num_chunks)), key=lambda n: -num_chunks[n])
        starts = [0]
        for step in range(max(num_chunks)):
            starts.append(starts[-1] + sum(count > step for count in num_chunks))
        order_N = torch.tensor(order, dtype=torch.long, device=self.device)
        rank_N = torch.empty_like(order_N)
        rank_N[order_N] = torch.arange(len(order), device=self.device)
        starts_S = torch.tensor(starts, dtype=torch.long, device=self.device)
        step_T = torch.div(self.offsets_T, chunk_size, rounding_mode="floor")
        chunk_T = starts_S[step_T] + rank_N[self.sequence_ids_T]
        rows_T = chunk_T * chunk_size + self.offsets_T % chunk_size
        is_full = starts[-1] * chunk_size == self.num_tokens
        return ChunkLayout(rows=rows_T, order=order_N, starts=tuple(starts), is_full=is_full)
