"""Which reader is taken, with disks that are made up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from qnext import ops
from qnext.errors import UsageError
from qnext.ops import RecordReader
from qnext.planning.expert_records import MatrixForm, RecordFile, RecordLayout
from qnext.residency.probe import Probe, probe

LAYOUT = RecordLayout(64, 32, MatrixForm("bfloat16"), MatrixForm("bfloat16"))
STRIDE = LAYOUT.stride
FILES = [
    RecordFile(f"model.layers.{layer}", Path(f"shard-{layer // 2}"), layer % 2 * 64 * STRIDE, LAYOUT, (0,) * 64)
    for layer in range(4)
]


class Disk:
    """Takes a second for a record, times what `slowness` says of the reader, and of how much was read before."""

    def __init__(self, slowness: dict[RecordReader, float] | None = None, *, works: str = "") -> None:
        self.slowness, self.works = slowness or {}, works
        self.log: list[tuple[RecordReader, Path, list[int]]] = []
        self.memories: set[int] = set()

    def time_reads(
        self, path: Path, offsets: Sequence[int], num_bytes: int, reader: RecordReader, memory_B: Tensor
    ) -> float:
        assert num_bytes == STRIDE and memory_B.nbytes >= reader.depth * num_bytes
        assert memory_B.data_ptr() % ops.cpu.residency.ALIGNMENT == 0
        if self.works and self.works not in repr(reader):
            raise OSError(22, f"{reader.kind} does not work")
        self.log.append((reader, path, list(offsets)))
        self.memories.add(memory_B.data_ptr())
        return self.seconds(reader, len(offsets))

    def seconds(self, reader: RecordReader, count: int) -> float:
        return count * self.slowness.get(reader, 1.0)


def measured(disk: Disk, *, num_records: int = 16) -> Probe:
    return probe(FILES, num_bytes=num_records * STRIDE, seed=1, time_reads=disk.time_reads)


def test_the_fastest_reader_is_taken() -> None:
    readers = list(measured(Disk()).rates)
    assert len(readers) == 4 and all(reader.is_direct for reader in readers)
    for reader in readers:
        found = measured(Disk({reader: 0.5}))
        assert found.best == reader and found.bytes_per_second == pytest.approx(2 * STRIDE)
        assert sorted(found.rates.values()) == pytest.approx([STRIDE, STRIDE, STRIDE, 2 * STRIDE])


class SleepingDisk(Disk):
    """The first read of all takes a minute more."""

    def seconds(self, reader: RecordReader, count: int) -> float:
        return count + 60.0 * (len(self.log) == 1)


class TiringDisk(Disk):
    """Every record takes longer than the one before."""

    def seconds(self, reader: RecordReader, count: int) -> float:
        read = sum(len(offsets) for _, _, offsets in self.log)
        return sum(1.0 + 0.1 * number for number in range(read - count, read))


@pytest.mark.parametrize(("slowness", "kind"), [(0.8, "io_uring"), (0.7, "threads")])
def test_threads_have_to_be_faster_by_what_they_take_from_arithmetic(slowness: float, kind: str) -> None:
    readers = measured(Disk()).rates
    found = measured(Disk({reader: slowness for reader in readers if reader.kind == "threads"}))
    assert found.best.kind == kind and found.bytes_per_second == found.rates[found.best]


@pytest.mark.parametrize("disk", [SleepingDisk(), TiringDisk()])
def test_no_reader_is_slow_because_of_its_turn(disk: Disk) -> None:
    rates = measured(disk).rates.values()
    assert max(rates) == pytest.approx(min(rates))


def test_readers_read_as_much_from_one_file_into_the_same_memory() -> None:
    disk = Disk()
    readers = list(measured(disk).rates)
    assert len(disk.memories) == 1
    bytes_read: Counter[RecordReader] = Counter()
    for start in range(0, len(disk.log), len(readers)):
        turn = disk.log[start : start + len(readers)]
        assert {reader for reader, _, _ in turn} == set(readers) and len({path for _, path, _ in turn}) == 1
        offsets = [offset for _, _, found in turn for offset in found]
        assert len(set(offsets)) == len(offsets), "what was read once may be in a cache of the disk"
        assert all(0 <= offset < 128 * STRIDE and offset % STRIDE == 0 for offset in offsets)
        bytes_read.update({reader: len(found) * STRIDE for reader, _, found in turn})
    assert set(bytes_read.values()) == {(1 + 16) * STRIDE}


def test_what_does_not_work_is_passed_over() -> None:
    assert {reader.kind for reader in measured(Disk(works="threads")).rates} == {"threads"}
    buffered = measured(Disk(works="is_direct=False"))
    assert [reader.is_direct for reader in buffered.rates] == [False]
    with pytest.raises(UsageError, match=r"shard-0: records cannot be read: .*threads does not work"):
        measured(Disk(works="nothing"))


class FailingDisk(Disk):
    """io_uring reads once, and then no more."""

    def seconds(self, reader: RecordReader, count: int) -> float:
        if reader.kind == "io_uring" and count > 1:
            raise RuntimeError("a read of the probe failed")
        return super().seconds(reader, count)


def test_a_reader_that_fails_later_is_passed_over() -> None:
    assert {reader.kind for reader in measured(FailingDisk()).rates} == {"threads"}


def test_fewer_records_than_readers_are_read_all_the_same() -> None:
    few = [FILES[0]._replace(checksums=(0, 0))]
    assert len(probe(few, seed=1, time_reads=Disk().time_reads).rates) == 4
