"""The processes that torchrun has started for a run, as one of them sees them.

Legend: R processes, N numbers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qnext.config import ModelConfig
from qnext.errors import LostRank, QnextError
from qnext.model import Batch, CausalLM
from qnext.parallel.link import FOREVER, meet_all
from qnext.parallel.train.context import RowContext, check_context, put_into_context
from qnext.parallel.train.experts import check_experts, deal_experts
from qnext.parallel.train.fsdp import CutParameters, RowsHere, initialize_parts, parts_as_model, shard_model
from qnext.parallel.watch import RankWatch, Vigilance

# torchrun ends the other processes half a minute after one has gone.
PATIENCE = 20.0  # seconds without a sign of life
_SECONDS_TO_MEET = 600.0
_MOST_BYTES_TOLD = 4096  # a path


def join_torchrun(division: Division) -> RanksOfRun:
    """Meet the other processes. Raises LostRank where they are not found."""
    try:
        store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timedelta(seconds=_SECONDS_TO_MEET)))
    except (RuntimeError, ValueError) as error:
        raise LostRank(f"the other processes of torchrun were not found: {error}") from error
    return RanksOfRun(store, rank, num_ranks, division)


class Division(NamedTuple):
    """Of all processes so many in a row share the routed experts, or the rows of a micro batch."""

    expert: int = 1
    context: int = 1


class RanksOfRun:
    """The TrainingRanks of torchrun: every process computes micro batches, and has a part of every parameter."""

    def __init__(
        self, store: dist.Store, rank: int, num_ranks: int, division: Division, *, patience: float = PATIENCE
    ) -> None:
        self.rank, self.num_ranks, self.division = rank, num_ranks, division
        self._watch = RankWatch(dist.PrefixStore("watch", store), rank, num_ranks, Vigilance(patience))
        self._parts = CutParameters(num_ranks)
        self._context: RowContext | None = None
        self.num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        with self.guarded():
            meet_all(store, rank, num_ranks)
            self.group = dist.group.WORLD
            self.aside = copy.copy(self)
            self.aside.group = dist.new_group(backend="gloo", timeout=FOREVER)

    @property
    def share(self) -> int:
        return self.rank // self.division.context

    @property
    def num_shares(self) -> int:
        return self.num_ranks // self.division.context

    @property
    def num_cuts(self) -> int:
        return self.division.context

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def new_model(self, config: ModelConfig, *, seed: int) -> CausalLM:
        model = self._empty_model(config)
        initialize_parts(model, self._parts, self.rank, seed=seed)
        return model

    def filled_model(self, config: ModelConfig, fill: Callable[[CausalLM, Any], None]) -> CausalLM:
        model = self._empty_model(config)
        fill(parts_as_model(model, self._parts), RowsHere(model, self._parts, self.rank))
        return model

    def _empty_model(self, config: ModelConfig) -> CausalLM:
        """That is cut, and has memory for what is here alone."""
        with torch.device("meta"):
            model = CausalLM(config)
        self._shard(model, "cpu")
        return model.to_empty(device="cpu")

    def shard(self, model: CausalLM) -> None:
        """Keep this process's part of every parameter alone."""
        self._shard(model, model.device.type)

    def _shard(self, model: CausalLM, device: str) -> None:
        expert, context = self.division
        check_experts(model.config, expert, num_ranks=self.num_ranks)
        check_context(context, num_ranks=self.num_ranks)
        world = dist.group.WORLD
        assert world is not None
        self._parts.forget()  # of another model, which was trained before
        with self.guarded():
            mesh = dealt_mesh = DeviceMesh.from_group(world, device)
            dealt: list[nn.Module] = []
            if context > 1:
                self._context = RowContext(self._in_a_row(device, context, "rows").get_group("rows"))
                put_into_context(model, self._context)
            if expert > 1:
                both = self._in_a_row(device, expert, "experts")
                dealt, dealt_mesh = deal_experts(model, both.get_group("experts")), both["copies"]
                order_MC = torch.arange(self.num_ranks).view(-1, expert).T.contiguous()
                self._parts.dealt_mesh = DeviceMesh(device, order_MC, mesh_dim_names=("dealt", "copy"))
            shard_model(model, mesh, dealt=dealt, dealt_mesh=dealt_mesh)

    def _in_a_row(self, device: str, size: int, name: str) -> DeviceMesh:
        return DeviceMesh(device, torch.arange(self.num_ranks).view(-1, size), mesh_dim_names=("copies", name))

    def cut_again(self, model: CausalLM) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def rows(self, num_rows: int) -> tuple[int, int]:
        return (0, num_rows) if self._context is None else self._context.span(num_rows)

    def cut_rows(self, batch: Batch) -> Batch:
        return batch if self._context is None else self._context.cut(batch)

    def gather(self, values_N: Tensor) -> Tensor:
        return self.gather_parts(values_N).view(self.num_shares, self.num_cuts, -1).sum(1)

    def add_cuts(self, values: Tensor) -> Tensor:
        values = values.detach().clone()
        if self._context is not None:
            dist.all_reduce(values, group=self._context.group)
        return values

    def gather_parts(self, values_N: Tensor) -> Tensor:
        values_N = values_N.contiguous()
        all_RN = values_N.new_empty(self.num_ranks, len(values_N))
        dist.all_gather(list(all_RN.unbind(0)), values_N, group=self.group)
        return all_RN

    def part(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._parts.add(parameter)

    def collect_gradients(self) -> None:
        self._parts.collect_gradients()
        if self._context is not None:
            self._context.whole = None  # what comes between two steps is not cut

    def shape(self, part: Tensor) -> torch.Size:
        return self._parts.of(part).shape

    @torch.no_grad()
    def whole(self, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        cuts = [self._parts.of(part) for part in parts]
        padded = cuts[0].padded(tensors)
        found = self.gather_parts(padded.flatten()).view(self.num_ranks, *padded.shape)
        return [cut.joined(each) for cut, each in zip(cuts, found.unbind(1), strict=True)]

    @torch.no_grad()
    def value(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return parameter
        cut = self._parts.cut(parameter)
        (padded,) = cut.padded([cut.part])
        return cut.joined(self.gather_parts(padded.flatten()).view(self.num_ranks, *padded.shape))

    def cut(self, tensor: Tensor, part: Tensor) -> Tensor:
        return self._parts.of(part).cut(tensor, self.rank)

    def placed(self, tensor: Tensor, part: Tensor) -> Tensor:
        return self._parts.of(part).placed(tensor)

    def told(self, text: str) -> str:
        raw = os.fsencode(text).ljust(_MOST_BYTES_TOLD, b"\0")
        told_N = self.gather_parts(torch.tensor(list(raw), dtype=torch.uint8))[0]
        return os.fsdecode(bytes(told_N.tolist()).rstrip(b"\0"))

    def gather_objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value, group=self.group)
        return found

    def by_first(self, action: Callable[[], object]) -> None:
        """The others end with the same exit code, and leave the words to the first."""
        failure: BaseException | None = None
        if self.is_first:
            try:
                action()
            except Exception as error:
                failure = error
        code = getattr(failure, "exit_code", 1) if failure is not None else 0
        with self.guarded():
            code = int(self.gather_parts(torch.tensor([code]))[0, 0])
        if failure is not None:
            raise failure
        if code:
            raise SystemExit(code)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch, whose words name an address
            lost = None if isinstance(error, QnextError) else self._watch.verdict()
            if lost is None:
                raise
            self.leave()
            raise lost from error

    def leave(self) -> None:
        """After a failure: nothing more is expected of the others."""
        self._watch.close()

    def close(self) -> None:
        """After the last call of all processes."""
        self.leave()
        dist.destroy_process_group()
