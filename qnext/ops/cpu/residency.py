"""Experts on disk that come into memory when a step needs them: what the kernels do by themselves, seen from Python.

Legend: E experts, B bytes of a record.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.errors import CorruptCheckpoint
from qnext.ops.cpu.kernels import kernels
from qnext.ops.cpu.matrices import fits_linear, handle_of
from qnext.ops.cpu.record_weights import RecordMatrix
from qnext.ops.memory import empty_huge

ALIGNMENT = 4096  # of memory, offsets and sizes of direct reads


class LayerRecords(NamedTuple):
    """Where the records of a layer lie on disk, and the CRC-32 of each."""

    name: str
    path: Path
    offset: int
    checksums: tuple[int, ...]


class RecordReader(NamedTuple):
    """How records are read: by `io_uring` or by `threads`, so many at once, past the page cache or through it."""

    kind: str
    depth: int
    is_direct: bool


class RecordError(CorruptCheckpoint):
    """A record that cannot be read or has other bytes than were written; layer and expert by number."""

    def __init__(self, layer: int, expert: int, message: str) -> None:
        super().__init__(message)
        self.layer, self.expert = layer, expert


class Residency:
    """Buffers for records, of which each layer keeps so many as it has `slots`; see residency.h and policy.py.

    `num_buffers` is larger than the sum of the slots: the others are for reads under way. Where a layer waits for less
    than `least_wait_ns` on average, the next one's experts are not guessed. Raises OSError for files that
    cannot be opened, ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        layers: Sequence[LayerRecords],
        slots: Sequence[int],
        *,
        record_bytes: int,
        num_buffers: int,
        half_life: int,
        reader: RecordReader,
        least_wait_ns: int,
    ) -> None:
        if len(slots) != len(layers) or min(slots) < 0 or num_buffers <= sum(slots):
            raise ValueError(f"{num_buffers} buffers are not more than the slots of {len(layers)} layers")
        self.layers = tuple(layers)
        self.num_experts, self.record_bytes, self.reader = len(layers[0].checksums), record_bytes, reader
        self.num_slots = sum(min(each, self.num_experts) for each in slots)
        self._routers: list[Tensor] = []
        self._memory_B = aligned_bytes(num_buffers * record_bytes)
        paths = list(dict.fromkeys(layer.path for layer in layers))
        files: list[int] = []
        kernels().raise_as(RecordError)
        try:
            files += (open_records(path, is_direct=reader.is_direct) for path in paths)
            self._native = kernels().Residency(
                num_experts=self.num_experts,
                record_bytes=record_bytes,
                half_life=half_life,
                least_wait_ns=least_wait_ns,
                files=files,
                layers=[_place_of(layer, paths) for layer in layers],
                slots=list(slots),
                buffers=self._memory_B.data_ptr(),
                num_buffers=num_buffers,
                reader=reader.kind,
                depth=reader.depth,
                owner=self._memory_B,
            )
        except BaseException:
            for file in files:
                os.close(file)
            raise

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return self._memory_B.nbytes

    def experts_of(self, layer: int) -> StreamedExperts:
        return StreamedExperts(self, layer, self._native.layer(layer))

    def counts(self) -> dict[str, int]:
        """Hits and misses so far, reads, guesses and nanoseconds of waiting; those of sweeps, long prompts, apart."""
        return dict(self._native.counts())

    def residents(self, layer: int) -> list[tuple[int, int]]:
        """The experts of a layer that are in memory with their loads, the most wanted first."""
        return list(self._native.residents(layer))

    def others(self, layer: int) -> list[tuple[int, int]]:
        """The other experts of a layer that have a load, the most wanted first."""
        return list(self._native.others(layer))

    def fill(self, layer: int, experts: Sequence[tuple[int, int]]) -> int:
        """Give experts such loads, and read them into the free slots of a layer, in this order, as far as there are
        any. How many were read."""
        return int(self._native.fill(layer, list(experts)))

    def look_ahead(self, layer: int, router_ED: Tensor) -> None:
        """Tell what routes tokens in the layer after `layer`: its likeliest experts are read a layer early, while that
        is mostly right and the disk is waited for. Wrong guesses cost time and change no result."""
        if fits_linear(router_ED):
            self._routers.append(router_ED)  # whose memory the kernels read
            self._native.look_ahead(layer, handle_of(router_ED))

    def clear(self) -> None:
        """Between two steps: no expert is in memory any more, and what is known of their uses is forgotten."""
        self._native.clear()

    def read(self, layer: int, expert: int) -> Tensor:
        """One record [B], from the disk. Raises RecordError."""
        record_B = aligned_bytes(self.record_bytes)
        self._native.read(layer, expert, record_B.data_ptr())
        return record_B


def _place_of(layer: LayerRecords, paths: Sequence[Path]) -> tuple[str, int, int, list[int]]:
    return f"{layer.path}: {layer.name}", paths.index(layer.path), layer.offset, list(layer.checksums)


class StreamedExperts:
    """The records of a layer, in memory as far as its slots go."""

    def __init__(self, residency: Residency, layer: int, native: Any) -> None:
        self.residency, self.layer = residency, layer
        self._native = native
        self.stamps: Tensor | None = torch.tensor(residency.layers[layer].checksums, dtype=torch.int64)

    @property
    def num_experts(self) -> int:
        return self.residency.num_experts

    def record(self, expert: int) -> Tensor:
        return self.residency.read(self.layer, expert)

    def give_to(self, handle: Any, matrix: RecordMatrix) -> None:
        zeros_at = -1 if matrix.zeros_at is None else matrix.zeros_at
        handle.use_source(self._native, matrix.values_at, matrix.scales_at, zeros_at)

    def use(self, experts: Sequence[int], uses: Sequence[int], *, num_tokens: int) -> int:
        """Ask for experts (ascending) as a step does, without computing. How many were in memory."""
        return int(self._native.use(list(experts), list(uses), num_tokens))


def aligned_bytes(count: int) -> Tensor:
    """Memory for direct reads, in huge pages when it is large."""
    whole = empty_huge((count + ALIGNMENT,), dtype=torch.uint8)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + count]


def open_records(path: Path, *, is_direct: bool) -> int:
    """A file descriptor for reading records. Raises OSError, also where the file system has no direct reads."""
    direct = os.O_DIRECT if is_direct else 0
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct)


def time_reads(
    path: Path, offsets: Sequence[int], num_bytes: int, reader: RecordReader, memory_B: Tensor | None = None
) -> float:
    """Seconds for reading parts of a file by `reader`, into memory from `aligned_bytes` that holds as many as it reads
    at once. Raises OSError or RuntimeError where it cannot."""
    if memory_B is None:
        memory_B = aligned_bytes(reader.depth * num_bytes)
    assert memory_B.nbytes >= reader.depth * num_bytes
    file = open_records(path, is_direct=reader.is_direct)
    try:
        return float(
            kernels().time_reads(reader.kind, reader.depth, file, list(offsets), num_bytes, memory_B.data_ptr())
        )
    finally:
        os.close(file)
