"""Experts between the memory of the host and that of a device: all wait on the host, and each layer has slots on the
device for those that were used last.

Legend: E experts, T tokens, A experts of a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qnext import ops


class DeviceSlots:
    """Which expert is in which slot, in integers. One that is needed takes the slot of the one used longest ago."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slot_of: OrderedDict[int, int] = OrderedDict()  # the one used longest ago first

    def take(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """Have these experts, each once, in slots: what is to be copied into which slot. They are at most as many as
        slots."""
        assert len(experts) <= self.num_slots, "ask for the whole layer"
        missing = []
        for expert in experts:
            if expert in self.slot_of:
                self.slot_of.move_to_end(expert)
            else:
                missing.append(expert)
        loads = []
        for expert in missing:
            is_full = len(self.slot_of) == self.num_slots
            slot = self.slot_of.popitem(last=False)[1] if is_full else len(self.slot_of)
            self.slot_of[expert] = slot
            loads.append((expert, slot))
        return loads


class WholeLayer:
    """Room on a device for all experts of one layer, which all layers share: for calls that need more than slots."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stacks: dict[tuple[object, ...], Tensor | ops.Weight] = {}

    def room_for(self, stack: Tensor | ops.Weight, place: str) -> Tensor | ops.Weight:
        """Memory in the form of a stack. `place` tells stacks apart that are needed together."""
        form = (place, *((tensor.shape, tensor.dtype) for tensor in tensors_of(stack)))
        if form not in self._stacks:
            self._stacks[form] = stack_like(stack, stack.shape[0], self.device)
        return self._stacks[form]


class HostedExperts:
    """The experts of a layer, gate_up and down. The same numbers are computed wherever they are.

    `num_hits` and `num_misses` count experts of calls that were in slots, and that were copied.
    """

    def __init__(
        self, gate_up: Tensor | ops.Weight, down: Tensor | ops.Weight, *, num_slots: int, whole: WholeLayer
    ) -> None:
        self._host, self._whole, self.device = (gate_up, down), whole, whole.device
        self._slots = DeviceSlots(min(num_slots, gate_up.shape[0]))
        self._there = tuple(stack_like(stack, self._slots.num_slots, self.device) for stack in self._host)
        self._slot_E = torch.zeros(gate_up.shape[0], dtype=torch.long, device=self.device)
        self.num_hits = self.num_misses = 0

    def bring(self, routing: ops.Routing, *, keeps_numbers: bool = False) -> ops.BroughtExperts:
        """See ops.BringsExperts."""
        experts = np.unique(routing.experts_TA.numpy(force=True)).tolist()
        if keeps_numbers or len(experts) > self._slots.num_slots:
            return self._bring_whole(experts, routing)
        loads = self._slots.take(experts)
        self._count(len(experts), len(loads))
        for host, there in zip(self._host, self._there, strict=True):
            for expert, slot in loads:
                copy_expert(host, expert, there, slot)
        if loads:
            experts_L, slots_L = torch.tensor(loads).T.to(self.device)
            self._slot_E.index_copy_(0, experts_L, slots_L)
        places_TA = self._slot_E[routing.experts_TA]
        return ops.BroughtExperts(self._there[0], self._there[1], routing._replace(experts_TA=places_TA))

    def _bring_whole(self, experts: Sequence[int], routing: ops.Routing) -> ops.BroughtExperts:
        """By single experts, or all of them at once where most are needed: each copy has to be asked for."""
        room = [self._whole.room_for(stack, place) for stack, place in zip(self._host, ("up", "down"), strict=True)]
        self._count(len(experts), len(experts))
        for host, to in zip(self._host, room, strict=True):
            if 2 * len(experts) > host.shape[0]:
                for of_E, to_E in zip(tensors_of(host), tensors_of(to), strict=True):
                    to_E.copy_(of_E, non_blocking=True)
            else:
                for expert in experts:
                    copy_expert(host, expert, to, expert)
        return ops.BroughtExperts(room[0], room[1], routing)

    def _count(self, num_experts: int, num_misses: int) -> None:
        self.num_hits += num_experts - num_misses
        self.num_misses += num_misses


def tensors_of(stack: Tensor | ops.Weight) -> list[Tensor]:
    """All of a stack."""
    return [stack] if isinstance(stack, Tensor) else stack.tensors


def stack_like(stack: Tensor | ops.Weight, num_experts: int, device: torch.device) -> Tensor | ops.Weight:
    """Memory on `device` for so many experts in the form of a stack. Raises TypeError for a form that has no copy."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty((num_experts, *tensor.shape[1:]), dtype=tensor.dtype, device=device)

    if isinstance(stack, Tensor):
        return like(stack)
    if isinstance(stack, ops.Fp8Weight):
        return ops.Fp8Weight(like(stack.codes), like(stack.scales), stack.block)
    if isinstance(stack, ops.QuantizedWeight):
        zeros = None if stack.zeros is None else like(stack.zeros)
        return replace(stack, codes=like(stack.codes), scales=like(stack.scales), zeros=zeros)
    raise TypeError(f"{type(stack).__name__} cannot be copied expert by expert")


def copy_expert(source: Tensor | ops.Weight, expert: int, target: Tensor | ops.Weight, place: int) -> None:
    """In the order of the device's work, so that whoever reads the place before has read it."""
    for of, to in zip(tensors_of(source), tensors_of(target), strict=True):
        to[place].copy_(of[expert], non_blocking=True)
