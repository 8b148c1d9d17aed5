"""How fast records can be read here, and by which reader best: measured when a model is opened."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qnext import ops
from qnext.errors import UsageError
from qnext.planning.expert_records import RecordFile

# The second kind where the file system has no direct reads.
_CANDIDATES = (
    (
        ops.RecordReader("io_uring", 4, is_direct=True),
        ops.RecordReader("io_uring", 16, is_direct=True),
        ops.RecordReader("threads", 4, is_direct=True),
        ops.RecordReader("threads", 16, is_direct=True),
    ),
    (ops.RecordReader("threads", 4, is_direct=False),),
)
_BYTES = 96 << 20  # that each reads
# Threads that read need a core at the moment when arithmetic has all of them: on two cores a token behind threads took
# 1.34 times as long as behind a ring of the same rate on an idle machine. They have to be so much faster.
_THREADS_COST = 1.3

# Seconds for reading parts of a file into memory: their offsets, and bytes of each; ops.time_reads.
TimeReads = Callable[[Path, Sequence[int], int, ops.RecordReader, Tensor], float]


@dataclass(frozen=True)
class Probe:
    """Bytes a second of each reader that works while nothing computes, and the best of them while something does."""

    rates: dict[ops.RecordReader, float]

    @property
    def best(self) -> ops.RecordReader:
        costs = {"threads": _THREADS_COST}
        return max(self.rates, key=lambda reader: self.rates[reader] / costs.get(reader.kind, 1.0))

    @property
    def bytes_per_second(self) -> float:
        return self.rates[self.best]


def probe(
    files: Sequence[RecordFile],
    *,
    num_bytes: int = _BYTES,
    seed: int | None = None,
    time_reads: TimeReads = ops.time_reads,
) -> Probe:
    """Readers take turns at records that are chosen at random, first one record each that does not count, then there
    and back: so neither a disk that was asleep nor one that tires decides. Raises UsageError where no reader works.
    """
    chance, stride = random.Random(seed), files[0].layout.stride
    offsets: dict[Path, list[int]] = defaultdict(list)
    for file in files:
        offsets[file.path] += (file.offset + expert * stride for expert in range(file.num_experts))
    paths, problem = list(offsets), ""
    for readers in _CANDIDATES:
        # Memory is there before: the system takes longer to provide it than a fast disk to fill it.
        memory_B = ops.aligned_bytes(max(reader.depth for reader in readers) * stride)
        ops.touch([memory_B])
        seconds: dict[ops.RecordReader, float] = dict.fromkeys(readers, 0.0)
        counts: dict[ops.RecordReader, int] = dict.fromkeys(readers, 0)
        for number, order in enumerate((readers, readers, readers[::-1])):
            path = chance.choice(paths)
            places = chance.sample(offsets[path], len(offsets[path]))
            count = max(1, min(num_bytes // 2 // stride, len(places) // len(readers))) if number else 1
            for turn, reader in enumerate(order):
                chosen = [places[(turn * count + i) % len(places)] for i in range(count)]
                try:
                    took = time_reads(path, chosen, stride, reader, memory_B)
                except (OSError, RuntimeError) as error:
                    seconds.pop(reader, None)
                    problem = str(error)
                    continue
                if number and reader in seconds:
                    seconds[reader] += took
                    counts[reader] += count
        if seconds:
            return Probe({reader: counts[reader] * stride / max(took, 1e-9) for reader, took in seconds.items()})
    raise UsageError(f"{paths[0]}: records cannot be read: {problem}")
