"""Ranks of one model as threads of a test, which talk through memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from qnext.ops import RecordError
from qnext.parallel.link import Traffic
from qnext.parallel.mesh import Mesh

Result = TypeVar("Result")
_SECONDS = 60.0  # a rank that failed leaves the others waiting no longer


class Meeting:
    """Where all ranks put something, and then see what all have put there."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=_SECONDS)
        self._places: list[Any] = [None] * num_ranks
        self.faults: dict[int, RecordError] = {}  # by order

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._places[rank] = value
        self._barrier.wait()
        found = list(self._places)
        self._barrier.wait()
        return found

    def break_up(self) -> None:
        self._barrier.abort()


class MemoryLink:
    """A Link, and orders, among threads."""

    def __init__(self, mesh: Mesh, meeting: Meeting) -> None:
        self.mesh, self.traffic, self._meeting = mesh, Traffic(), meeting
        self.num_local, self._num_orders = mesh.num_ranks, 0

    def gather(self, x_TC: Tensor, widths: Sequence[int]) -> Tensor:
        found = self._meeting.exchange(self.mesh.rank, x_TC)
        parts = [found[rank] for rank in self.mesh.tensor_ranks]
        assert [part.shape[1] for part in parts] == list(widths)
        self._count(max(widths) * len(x_TC) * x_TC.itemsize, len(widths))
        return torch.cat(parts, 1)

    def gather_rows(self, x_PC: Tensor, counts: Sequence[int]) -> Tensor:
        found = [each.clone() for each in self._meeting.exchange(self.mesh.rank, x_PC)]
        assert [len(each) for each in found] == list(counts)
        self._count(x_PC.nbytes, len(found))
        return torch.cat(found)

    def tell(self, order: bytes) -> None:
        self._num_orders += 1
        self._meeting.exchange(0, order)

    def hear(self) -> bytes:
        self._num_orders += 1
        order: bytes = self._meeting.exchange(self.mesh.rank, None)[0]
        return order

    def least(self, numbers: Sequence[int]) -> list[int]:
        return [min(each) for each in zip(*self._meeting.exchange(self.mesh.rank, list(numbers)), strict=True)]

    def all_broke(self) -> bool:
        """Or the ranks that have not wait for this one in vain, and the test fails."""
        self._meeting.exchange(self.mesh.rank, None)
        return True

    def tell_fault(self, error: RecordError) -> None:
        self._meeting.faults.setdefault(self._num_orders, error)

    def fault(self) -> RecordError | None:
        return self._meeting.faults.get(self._num_orders)

    def _count(self, num_bytes: int, num_ranks: int) -> None:
        self.traffic.num_messages += 1
        self.traffic.num_bytes += num_bytes * (num_ranks - 1)


def on_all_ranks(tensor: int, expert: int, run: Callable[[Mesh, MemoryLink], Result]) -> list[Result]:
    """What `run` gives on each rank. Raises what a rank raises."""
    num_ranks = tensor * expert
    meeting = Meeting(num_ranks)

    def guarded(rank: int) -> Result:
        mesh = Mesh(tensor, expert, rank)
        try:
            return run(mesh, MemoryLink(mesh, meeting))
        except BaseException:
            meeting.break_up()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(num_ranks)]
    failures = [failure for future in futures if (failure := future.exception()) is not None]
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    return [future.result() for future in futures]
