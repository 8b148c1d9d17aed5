"""What an adapter changes, as its factors say: a factor that begins at zero and has moved got gradient."""

from __future__ import annotations

from dataclasses import dataclass

from qnext.errors import QnextError
from qnext.lora.adapt import Adapter
from qnext.ops import LowRank


class NoEffect(QnextError):
    """An adapter, or a part of it, changes nothing."""


@dataclass(frozen=True)
class LoraReport:
    """What was trained. An expert is changed where the product of its factors is not zero."""

    num_parameters: int
    num_matrices: int  # that are adapted; a stack of experts is one
    without_effect: tuple[str, ...]  # parameters whose change is zero, a stack only where it is so for all its experts
    experts: dict[str, tuple[int, int]]  # by name of a stack: experts that are changed, of those that are adapted

    def check(self) -> None:
        """Raises NoEffect naming what was to be adapted and did not change."""
        if not self.without_effect:
            return
        first, *others = self.without_effect
        more = f" and {len(others)} more of {self.num_matrices}" if others else ""
        raise NoEffect(
            f"the adapter changes nothing in {first}{more}: no gradient reached it; train longer, or leave it out"
        )

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.num_matrices} matrices adapted by {self.num_parameters:,} parameters"]
        if self.experts:
            shares = [changed / of_all for changed, of_all in self.experts.values()]
            changed, of_all = (sum(column) for column in zip(*self.experts.values(), strict=True))
            lines.append(
                f"{changed:,} of {of_all:,} adapted expert matrices got gradient; per layer {min(shares):.0%} to "
                f"{max(shares):.0%}"
            )
        return lines


def describe_adapter(adapter: Adapter) -> LoraReport:
    without, experts = [], {}
    for name, part in adapter.parts.items():
        changed, of_all = _changed(part)
        if part.A.dim() == 3:
            experts[name] = (changed, of_all)
        if not changed:
            without.append(name)
    count = sum(part.A.numel() + part.B.numel() for part in adapter.parts.values())
    return LoraReport(count, len(adapter.parts), tuple(without), experts)


def _changed(part: LowRank) -> tuple[int, int]:
    """How many matrices are changed, and of how many."""
    if part.A.dim() == 2:
        return int(bool(part.A.any()) and bool(part.B.any())), 1
    has_a_K, has_b_K = (factor.flatten(1).any(1) for factor in (part.A, part.B))
    is_changed_K = has_a_K & has_b_K
    return int(is_changed_K.sum()), len(is_changed_K)
