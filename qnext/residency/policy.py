"""Which experts of a layer stay in memory: the definition, in integers, of what residency.cpp does inside of a step.

An expert's load is the number of its uses, halved once every half life. An expert that was read stays if a slot is
free, or if a resident is wanted less: one with a lower load, then one that was used longer ago, then one with a higher
number. So a burst of experts that are used once does not drive out those that are used again and again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

USE = 1 << 16  # the load of one use, so that halves of it still count


@dataclass
class _Expert:
    load: int = 0
    epoch: int = 0  # half lives up to which the load is halved
    last: int = -1  # the layer's time of the last use


class ResidentSet:
    """The residents of one layer with `num_slots` slots; `half_life` is in tokens."""

    def __init__(self, num_experts: int, num_slots: int, *, half_life: int) -> None:
        if num_slots < 0 or half_life < 1:
            raise ValueError(f"{num_slots} slots with a half life of {half_life} tokens are impossible")
        self.num_slots, self._half_life = num_slots, half_life
        self._experts = [_Expert() for _ in range(num_experts)]
        self._residents: set[int] = set()
        self._now = 0

    def use(self, experts: Sequence[int], uses: Sequence[int], *, num_tokens: int) -> int:
        """One call of the layer: its experts, ascending and each once, and how many of `num_tokens` tokens use each.
        How many were resident."""
        self._now += num_tokens
        for expert, count in zip(experts, uses, strict=True):
            state = self._experts[expert]
            state.load = self._load(expert) + count * USE
            state.epoch, state.last = self._epoch, self._now
        misses = [expert for expert in experts if expert not in self._residents]
        for expert in misses:
            self._keep_or_give_up(expert)
        return len(experts) - len(misses)

    def residents(self) -> list[tuple[int, int]]:
        """Experts with their loads, the most wanted first."""
        ordered = sorted(self._residents, key=self._want, reverse=True)
        return [(expert, self._load(expert)) for expert in ordered]

    def others(self) -> list[tuple[int, int]]:
        """The other experts that have a load, the most wanted first."""
        known = (expert for expert in range(len(self._experts)) if expert not in self._residents and self._load(expert))
        return [(expert, self._load(expert)) for expert in sorted(known, key=self._want, reverse=True)]

    @property
    def _epoch(self) -> int:
        return self._now // self._half_life

    def _load(self, expert: int) -> int:
        state = self._experts[expert]
        return state.load >> min(63, self._epoch - state.epoch)

    def _want(self, expert: int) -> tuple[int, int, int]:
        return self._load(expert), self._experts[expert].last, -expert

    def _keep_or_give_up(self, expert: int) -> None:
        if len(self._residents) < self.num_slots:
            self._residents.add(expert)
        elif self._residents:
            least = min(self._residents, key=self._want)
            if self._want(expert) > self._want(least):
                self._residents.remove(least)
                self._residents.add(expert)
