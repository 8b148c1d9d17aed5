"""The parameters of a model, cut among processes by PyTorch's FSDP2, and the parts of this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qnext.model import CausalLM


def shard_model(model: CausalLM, mesh: DeviceMesh) -> None:
    """Cut every parameter of `model` into as many rows as there are processes, in place.

    A layer has whole parameters while it computes, which are plain tensors to whoever reads them there; embedding, head
    and final norm have them from the first layer to the end of the backward pass. Gradients are summed over the
    processes, not averaged: losses are divided by what the whole step holds.
    """
    for part in (*model.model.layers, *(() if model.mtp is None else (model.mtp,)), model):
        fully_shard(part, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


class CutParameter(NamedTuple):
    """A parameter of the model, and what of it is here."""

    parameter: DTensor
    part: nn.Parameter


class CutParameters:
    """The parts of parameters that FSDP2 has cut: plain tensors, which share the memory of the cut ones."""

    def __init__(self, num_ranks: int, rank: int) -> None:
        self._num_ranks, self._rank = num_ranks, rank
        self._cuts: dict[int, CutParameter] = {}

    def add(self, parameter: nn.Parameter) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        part = nn.Parameter(parameter.to_local().detach())
        self._cuts[id(part)] = CutParameter(parameter, part)
        return part

    @torch.no_grad()
    def collect_gradients(self) -> None:
        for cut in self._cuts.values():
            gradient = cut.parameter.grad
            cut.part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None

    def shape(self, part: Tensor) -> torch.Size:
        return self._cuts[id(part)].parameter.shape

    def padded(self, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
        """[N, rows of the largest part, ...]: tensors of one shape that are cut as `parts` are."""
        shape = self.shape(parts[0])
        rows = -(-shape[0] // self._num_ranks)
        padded = tensors[0].new_zeros(len(tensors), rows, *shape[1:])
        for place, tensor in zip(padded, tensors, strict=True):
            place[: len(tensor)] = tensor
        return padded

    def joined(self, padded: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        """[processes, N, rows, ...] -> N whole tensors."""
        shape = self.shape(parts[0])
        return [each.flatten(0, 1)[: shape[0]] for each in padded.unbind(1)]

    def cut(self, tensor: Tensor, part: Tensor) -> Tensor:
        rows = -(-self.shape(part)[0] // self._num_ranks)
        return tensor[self._rank * rows : self._rank * rows + len(part)]
