"""Experts between the memory of the host and that of a device: all wait on the host, and each layer has slots on the
device for those that were used last.

Legend: E experts, T tokens, A experts of a token, D hidden, G guesses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qnext import ops
from qnext.residency.ahead import NUM_LIKELY, CopiesAhead
from qnext.residency.stacks import copy_expert, form_of, stack_like, tensors_of

_COUNTED = ("hits", "misses", "sweep_hits", "sweep_misses", "reads", "guesses", "guesses_used")


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
        form = (place, *form_of(stack))
        if form not in self._stacks:
            self._stacks[form] = stack_like(stack, stack.shape[0], self.device)
        return self._stacks[form]


class HostedExperts:
    """The experts of a layer, gate_up and down. The same numbers are computed wherever they are.

    `counts` are those of ops.Residency: experts of calls that were in slots (`hits`), or were not (`misses`); the same
    of sweeps, which need half of the layer or more; copies (`reads`); `guesses`, which were copied before the layer
    asked, and `guesses_used`, for which it asked then.
    """

    def __init__(
        self, gate_up: Tensor | ops.Weight, down: Tensor | ops.Weight, *, num_slots: int, whole: WholeLayer
    ) -> None:
        self._host, self._whole, self.device = (gate_up, down), whole, whole.device
        self._slots = DeviceSlots(min(num_slots, gate_up.shape[0]))
        self._there = tuple(stack_like(stack, self._slots.num_slots, self.device) for stack in self._host)
        self._slot_E = torch.zeros(gate_up.shape[0], dtype=torch.long, device=self.device)
        self.counts = dict.fromkeys(_COUNTED, 0)
        self._ahead: CopiesAhead | None = None
        self._next: tuple[HostedExperts, Tensor] | None = None

    def look_ahead(self, ahead: CopiesAhead, following: tuple[HostedExperts, Tensor] | None) -> None:
        """From now on, guess what the following layer needs, by asking its router [E, D] early; the last layer has none
        that follows. Wrong guesses take time and change no result."""
        self._ahead, self._next = ahead, following

    def bring(
        self, routing: ops.Routing, x_TD: Tensor | None = None, *, keeps_numbers: bool = False
    ) -> ops.BroughtExperts:
        """See ops.BringsExperts."""
        likely_G, chosen = self._likely(x_TD), routing.experts_TA.flatten()
        numbers = (chosen if likely_G is None else torch.cat([chosen, likely_G])).numpy(force=True)  # waits once
        experts = np.unique(numbers[: len(chosen)]).tolist()
        ahead = {} if self._ahead is None else self._ahead.settle(self, experts)
        self.counts["guesses_used"] += len(ahead)
        if keeps_numbers or len(experts) > self._slots.num_slots:
            return self._bring_whole(experts, routing)
        loads = self._slots.take(experts)
        self._count(len(experts), len(loads), num_copies=len(loads) - len(ahead))
        for expert, slot in loads:
            if self._ahead is not None and expert in ahead:
                self._ahead.move(ahead[expert], self._there, slot)
            else:
                for host, there in zip(self._host, self._there, strict=True):
                    copy_expert(host, expert, there, slot)
        if self._ahead is not None and self._next is not None and likely_G is not None:
            self._next[0].expect(self._ahead, list(dict.fromkeys(numbers[len(chosen) :].tolist())))
        if loads:
            experts_L, slots_L = torch.tensor(loads).T.to(self.device, non_blocking=True)
            self._slot_E.index_copy_(0, experts_L, slots_L)
        places_TA = self._slot_E[routing.experts_TA]
        return ops.BroughtExperts(self._there[0], self._there[1], routing._replace(experts_TA=places_TA))

    def expect(self, ahead: CopiesAhead, likely: Sequence[int]) -> None:
        """Begin to copy those of these experts, the likeliest first, that are in no slot, as far as there is room."""
        missing = [expert for expert in likely if expert not in self._slots.slot_of]
        begun = ahead.begin(self, self._host, missing)
        self.counts["guesses"] += begun
        self.counts["reads"] += begun

    def _likely(self, x_TD: Tensor | None) -> Tensor | None:
        """[G] whom the next layer's router chooses for this layer's input, the best of each token first; None where
        nothing is to be guessed."""
        if self._ahead is None or self._next is None or x_TD is None or not self._ahead.is_worth_it(len(x_TD)):
            return None
        router_ED = self._next[1]
        scores_TE = ops.linear(x_TD.to(router_ED.dtype), router_ED)
        return scores_TE.topk(min(NUM_LIKELY, router_ED.shape[0]), dim=1).indices.T.flatten()

    def _bring_whole(self, experts: Sequence[int], routing: ops.Routing) -> ops.BroughtExperts:
        """By single experts, or all of them at once where most are needed: each copy has to be asked for."""
        room = [self._whole.room_for(stack, place) for stack, place in zip(self._host, ("up", "down"), strict=True)]
        is_copied_at_once = 2 * len(experts) > self.num_experts
        num_copies = self.num_experts if is_copied_at_once else len(experts)
        self._count(len(experts), len(experts), num_copies=num_copies)
        for host, to in zip(self._host, room, strict=True):
            if is_copied_at_once:
                for of_E, to_E in zip(tensors_of(host), tensors_of(to), strict=True):
                    to_E.copy_(of_E, non_blocking=True)
            else:
                for expert in experts:
                    copy_expert(host, expert, to, expert)
        return ops.BroughtExperts(room[0], room[1], routing)

    def _count(self, num_asked: int, num_misses: int, *, num_copies: int) -> None:
        kind = "sweep_" if 2 * num_asked >= self.num_experts else ""
        self.counts[f"{kind}hits"] += num_asked - num_misses
        self.counts[f"{kind}misses"] += num_misses
        self.counts["reads"] += num_copies

    @property
    def num_experts(self) -> int:
        return self._host[0].shape[0]

    @property
    def num_slots(self) -> int:
        return self._slots.num_slots

    @property
    def record_bytes(self) -> int:
        """Of one expert."""
        return sum(stack.nbytes for stack in self._host) // self.num_experts


class HostedLayers(NamedTuple):
    """All layers of a model whose experts wait on the host: what they have and count together; see ops.Residency."""

    layers: tuple[HostedExperts, ...]

    @classmethod
    def of(cls, weights: Iterable[ops.Weight]) -> HostedLayers | None:
        """Those among the weights of a model; None where none wait."""
        hosted = (weight.experts for weight in weights if isinstance(weight, ops.HostedWeight))
        layers = tuple(dict.fromkeys(each for each in hosted if isinstance(each, HostedExperts)))
        return cls(layers) if layers else None

    def counts(self) -> dict[str, int]:
        return {name: sum(layer.counts[name] for layer in self.layers) for name in _COUNTED}

    @property
    def num_experts(self) -> int:
        """Of each layer."""
        return self.layers[0].num_experts

    @property
    def num_slots(self) -> int:
        """Of all layers."""
        return sum(layer.num_slots for layer in self.layers)

    @property
    def record_bytes(self) -> int:
        """Of one expert, on average."""
        return sum(layer.record_bytes for layer in self.layers) // len(self.layers)

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return sum(layer.num_slots * layer.record_bytes for layer in self.layers)
