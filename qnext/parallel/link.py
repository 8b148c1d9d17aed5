"""What ranks tell each other: tensors of a step, and orders from the first rank to the others.

Legend: T tokens, C columns of one rank, R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from qnext.ops import RecordError
from qnext.parallel.mesh import Mesh
from qnext.parallel.watch import RankWatch

_FIRST_BYTES = 8192  # of an order, with its length before it; the rest of a longer one follows
_SECONDS_TO_BREAK = 5.0  # between ranks at which a plan breaks off: some layers of a long prompt

FOREVER = timedelta(days=365)  # of a call: a watch knows whether the others live


def meet_all(store: dist.Store, rank: int, num_ranks: int) -> None:
    """Make the group of all ranks, which talk by gloo and on GPUs by NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=FOREVER)


class Link(Protocol):
    """Between the ranks of a model, which all call the same in the same order."""

    def gather(self, x_TC: Tensor, widths: Sequence[int]) -> Tensor:
        """The columns of all parts, side by side: [T, sum of the widths]."""

    def gather_rows(self, x_PC: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one after another: [sum of the counts, C]."""

    def tell_fault(self, error: RecordError) -> None:
        """This rank lacks a part of what it is to send. All will know of it at the end of the order."""


@dataclass
class Traffic:
    """What one rank has sent to others, of tensors in steps. What goes to several counts for each of them."""

    num_messages: int = 0
    num_bytes: int = 0


class DistributedLink:
    """The process groups of torch.distributed. Raises LostRank, which names the rank, where another one is gone.

    A call waits as long as `watch` sees all ranks alive. `num_local` ranks are on this machine.
    """

    def __init__(self, mesh: Mesh, store: dist.Store, watch: RankWatch, *, num_local: int = 1) -> None:
        self.mesh, self.traffic = mesh, Traffic()
        self.watch, self.num_local = watch, num_local
        self._store, self._num_orders = store, 0
        with self._naming_the_lost():
            meet_all(store, mesh.rank, mesh.num_ranks)
            self._orders = dist.new_group(backend="gloo", timeout=FOREVER)
            firsts = range(0, mesh.num_ranks, mesh.tensor)
            groups = [dist.new_group(list(range(first, first + mesh.tensor)), timeout=FOREVER) for first in firsts]
        self._tensor_group = groups[mesh.rank // mesh.tensor]

    # ---- tensors ----

    def gather(self, x_TC: Tensor, widths: Sequence[int]) -> Tensor:
        num_parts, widest = len(widths), max(widths)
        if x_TC.shape[1] < widest:
            x_TC = functional.pad(x_TC, (0, widest - x_TC.shape[1]))
        parts_RTC = self._all(x_TC, num_parts, self._tensor_group)
        if min(widths) == widest:
            return parts_RTC.transpose(0, 1).reshape(len(x_TC), num_parts * widest)
        return torch.cat([part_TC[:, :width] for part_TC, width in zip(parts_RTC, widths, strict=True)], 1)

    def gather_rows(self, x_PC: Tensor, counts: Sequence[int]) -> Tensor:
        all_PC = x_PC.new_empty(sum(counts), x_PC.shape[1])
        parts = all_PC.split(list(counts))
        parts[self.mesh.rank].copy_(x_PC)
        with self._naming_the_lost():
            works = [
                dist.broadcast(part_PC.view(torch.uint8), rank, async_op=True)
                for rank, part_PC in enumerate(parts)
                if len(part_PC)
            ]
            for work in works:
                work.wait()
        self.traffic.num_messages += len(x_PC) > 0
        self.traffic.num_bytes += x_PC.nbytes * (self.mesh.num_ranks - 1)
        return all_PC

    def _all(self, x_TC: Tensor, num_ranks: int, group: dist.ProcessGroup) -> Tensor:
        """[R, T, C]"""
        x_TC = x_TC.contiguous()
        parts_RTC = x_TC.new_empty(num_ranks, *x_TC.shape)
        with self._naming_the_lost():
            # As bytes: not every back end knows every dtype.
            dist.all_gather(list(parts_RTC.view(torch.uint8).unbind(0)), x_TC.view(torch.uint8), group=group)
        self.traffic.num_messages += 1
        self.traffic.num_bytes += x_TC.nbytes * (num_ranks - 1)
        return parts_RTC

    # ---- orders ----

    def tell(self, order: bytes) -> None:
        """From the first rank to all others."""
        self._num_orders += 1
        first_B = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        framed_B = torch.frombuffer(bytearray(len(order).to_bytes(8, "little") + order), dtype=torch.uint8)
        first_B[: len(framed_B)] = framed_B[:_FIRST_BYTES]
        self._broadcast(first_B)
        if len(framed_B) > _FIRST_BYTES:
            self._broadcast(framed_B[_FIRST_BYTES:])

    def hear(self) -> bytes:
        """The next order of the first rank, however long that takes."""
        self._num_orders += 1
        first_B = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        self._broadcast(first_B)
        first = first_B.numpy().tobytes()
        length = int.from_bytes(first[:8], "little")
        rest_B = torch.empty(max(0, 8 + length - _FIRST_BYTES), dtype=torch.uint8)
        if len(rest_B):
            self._broadcast(rest_B)
        return (first[8:] + rest_B.numpy().tobytes())[:length]

    def all_broke(self) -> bool:
        """Whether the last order broke off on all ranks, as it did on this one. Waits a moment for the others."""
        with self._naming_the_lost():
            return self.watch.meet(f"broke/{self._num_orders}", seconds=_SECONDS_TO_BREAK)

    def tell_fault(self, error: RecordError) -> None:
        with self._naming_the_lost():
            told = json.dumps([error.layer, error.expert, f"rank {self.mesh.rank}: {error}"])
            self._store.compare_set(f"fault/{self._num_orders}", "", told)

    def fault(self) -> RecordError | None:
        """What a rank could not read for the last order, which all have carried out to its end nevertheless."""
        key = f"fault/{self._num_orders}"
        with self._naming_the_lost():
            return RecordError(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest of each over all ranks."""
        found_N = torch.tensor(numbers, dtype=torch.int64)
        with self._naming_the_lost():
            dist.all_reduce(found_N, dist.ReduceOp.MIN, group=self._orders)
        return found_N.tolist()

    def _broadcast(self, bytes_B: Tensor) -> None:
        with self._naming_the_lost():
            dist.broadcast(bytes_B, 0, group=self._orders)

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch, whose words name an address
            lost = self.watch.verdict()
            if lost is None:
                raise
            raise lost from error

    def close(self) -> None:
        """After the last call of all ranks."""
        self.watch.close()
        dist.destroy_process_group()
