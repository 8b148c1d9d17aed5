"""The parameters of a model, cut among processes by PyTorch's FSDP2, and the parts of this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qnext.model import CausalLM
from qnext.model.init import initial_values
from qnext.parallel.shard import Span
from qnext.planning import ParameterInfo, list_parameters


def shard_model(model: CausalLM, mesh: DeviceMesh, *, dealt: Sequence[nn.Module], dealt_mesh: DeviceMesh) -> None:
    """Cut every parameter of `model` into as many rows as there are processes, in place. Those of `dealt` modules are
    cut among the processes that have the same experts.

    A layer has whole parameters while it computes, which are plain tensors to whoever reads them there; embedding, head
    and final norm have them from the first layer to the end of the backward pass. Gradients are summed over the
    processes, not averaged: losses are divided by what the whole step holds.
    """
    for module in dealt:
        fully_shard(module, mesh=dealt_mesh)
    for part in (*model.model.layers, *(() if model.mtp is None else (model.mtp,)), model):
        fully_shard(part, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def initialize_parts(model: CausalLM, cuts: CutParameters, rank: int, *, seed: int) -> None:
    """Give what is here of each parameter the values of `initialize`. Of a stack of experts only those that are here
    are made; anything else is made whole, one parameter at a time, and cut."""
    infos = list_parameters(model.config)
    for name, parameter in model.named_parameters():
        cut, info = cuts.cut(parameter), infos[name]
        if info.expert_axis is None:
            cut.part.copy_(cut.cut(initial_values(model.config, info, seed=seed, dtype=parameter.dtype), rank))
            continue
        experts = cut.cut(torch.arange(cut.shape[0]), rank).tolist()
        for expert, part in zip(experts, cut.part, strict=True):
            part.copy_(initial_values(model.config, info, seed=seed, expert=expert, dtype=parameter.dtype))


def parts_as_model(model: CausalLM, cuts: CutParameters) -> CausalLM:
    """A model in which what is here of each parameter of `model` stands in its place, in the same memory: to be filled,
    and not to be called."""
    with torch.device("meta"):
        view = CausalLM(model.config)
    modules = dict(view.named_modules())
    for name, parameter in model.named_parameters():
        prefix, _, key = name.rpartition(".")
        modules[prefix]._parameters[key] = cuts.cut(parameter).part
    return view


class RowsHere:
    """What the process `rank` has of each parameter of a cut model: a RankRows of checkpoint.cut."""

    def __init__(self, model: CausalLM, cuts: CutParameters, rank: int) -> None:
        self._spans = {name: cuts.cut(parameter).span(rank) for name, parameter in model.named_parameters()}
        stacks = [info for info in list_parameters(model.config).values() if info.expert_axis is not None]
        self._experts = {info.layer: range(*self._spans[info.name]) for info in stacks}

    def experts_of(self, layer: int) -> range:
        return self._experts[layer]

    def spans_of(self, info: ParameterInfo) -> list[Span]:
        start, end = self._spans[info.name]
        return [(start, end)] if start < end else []

    def info_of(self, info: ParameterInfo) -> ParameterInfo:
        start, end = self._spans[info.name]
        return info._replace(shape=(end - start, *info.shape[1:]))


@dataclass(frozen=True)
class CutParameter:
    """A parameter of the model and what of it is here. Of `num_dealt` processes in a row each has as many rows of the
    whole; those at the same place in their rows of processes have cut these among them."""

    parameter: DTensor
    part: nn.Parameter
    num_dealt: int
    mesh: DeviceMesh  # all processes, in the order of their rows

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        rows, *more = self.parameter.shape
        return torch.Size([rows * self.num_dealt, *more])

    @property
    def largest(self) -> int:
        """The rows of the largest part."""
        return -(-self.parameter.shape[0] // self.parameter.device_mesh.size())

    def padded(self, tensors: Sequence[Tensor]) -> Tensor:
        """[N, rows of the largest part, ...]: tensors that are cut as the parameter is."""
        padded = tensors[0].new_zeros(len(tensors), self.largest, *self.shape[1:])
        for place, tensor in zip(padded, tensors, strict=True):
            place[: len(tensor)] = tensor
        return padded

    def joined(self, parts_RX: Tensor) -> Tensor:
        """[processes, rows of the largest part, ...] -> the whole."""
        dealt = parts_RX.unflatten(0, (-1, self.num_dealt)).transpose(0, 1).flatten(1, 2)
        return dealt[:, : self.parameter.shape[0]].flatten(0, 1)

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        start, end = self.span(rank)
        return whole[start:end]

    def span(self, rank: int) -> Span:
        """The rows that a rank has, this one."""
        group, place = divmod(rank, self.num_dealt)
        start = place * self.parameter.shape[0] + group * self.largest
        return start, start + len(self.part)

    def placed(self, tensor: Tensor) -> DTensor:
        """A tensor that is cut as the part is, with its place in the whole."""
        shape = self.shape
        stride = torch.empty(shape, device="meta").stride()
        rows = [Shard(0)] * self.mesh.ndim
        return DTensor.from_local(tensor, self.mesh, rows, run_check=False, shape=shape, stride=stride)


class CutParameters:
    """The parts of parameters that FSDP2 has cut: plain tensors, which share the memory of the cut ones."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._cuts: dict[int, CutParameter] = {}
        self.dealt_mesh: DeviceMesh | None = None  # [dealt, copies], where experts are dealt

    def forget(self) -> None:
        self._cuts.clear()

    def add(self, parameter: nn.Parameter) -> nn.Parameter:
        cut = self.cut(parameter)
        self._cuts[id(cut.part)] = cut
        return cut.part

    def cut(self, parameter: Tensor) -> CutParameter:
        """Of a parameter that FSDP2 has cut."""
        assert isinstance(parameter, DTensor)
        mesh = parameter.device_mesh
        num_dealt = self._num_ranks // mesh.size()
        if num_dealt > 1:
            assert self.dealt_mesh is not None
            mesh = self.dealt_mesh
        return CutParameter(parameter, nn.Parameter(parameter.to_local().detach()), num_dealt, mesh)

    def of(self, part: Tensor) -> CutParameter:
        return self._cuts[id(part)]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        for cut in self._cuts.values():
            gradient = cut.parameter.grad
            cut.part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
