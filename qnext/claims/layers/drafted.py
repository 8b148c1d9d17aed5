"""What drafts give the released model: steps of several rows of a sequence, layer by layer, and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qnext.claims.claim import Grid, Workplace, ratio_cell
from qnext.claims.layers.speed import LayerSpeed
from qnext.claims.layers.times import LayerSeconds, draft_seconds, hybrid_step
from qnext.claims.notebook import Measured, Point
from qnext.eval.intervals import Interval, mean_interval


@dataclass(frozen=True)
class DraftedSteps:
    """Steps behind `context` tokens with up to `most_drafts` drafts to be verified."""

    run: LayerSpeed
    context: int
    most_drafts: int

    def points(self, at: Workplace) -> list[Point]:
        return [self.run.drafted_point(at, self.context, 1 + drafts) for drafts in range(self.most_drafts + 1)]

    def grids(
        self, known: Mapping[str, Measured], acceptance: Mapping[str, float]
    ) -> tuple[dict[str, Interval], list[Grid]]:
        """Ratios with one draft by the name of a text, and the tables; nothing before all steps were timed.

        A draft is right as often as the first one of that text, whatever came before it.
        """
        entries = [known.get(self.run.drafted_name(self.context, 1 + drafts)) for drafts in range(self.most_drafts + 1)]
        rounds = [entry.value for entry in entries if entry is not None]
        if len(rounds) <= self.most_drafts:
            return {}, []
        costs = self._costs(rounds)
        gains = {
            text: [mean_interval([_tokens(right, count) / one for one in cost]) for count, cost in enumerate(costs)]
            for text, right in acceptance.items()
        }
        place = f"released shapes, {self.run.scheme}, behind {self.context:,} tokens"
        grids = [
            Grid(
                f"A step of the whole model and the drafting for it, as the sum of its layers: {place}",
                ["drafts of a step", "over a step without", "acceptance that pays"],
                [
                    [str(count), ratio_cell(mean_interval(cost)), _needed(mean_interval(cost).value, count)]
                    for count, cost in enumerate(costs)
                    if count
                ],
            ),
            Grid(
                f"Speed over that without drafts, by arithmetic, intervals of the times alone: {place}",
                ["text", *(f"{count} drafted" for count in range(1, len(costs)))],
                [[text, *map(ratio_cell, ratios[1:])] for text, ratios in gains.items()],
            ),
        ]
        return {f"released_{text}": ratios[1] for text, ratios in gains.items()}, grids

    def _costs(self, rounds: Sequence[Sequence[LayerSeconds]]) -> list[list[float]]:
        """By the number of drafts, round by round: seconds of a step and its drafts, over those of a step without."""
        of = self.run.of
        return [
            [
                (hybrid_step(layers, of) + count * draft_seconds(plain, of)) / hybrid_step(plain, of)
                for layers, plain in zip(each, rounds[0], strict=True)
            ]
            for count, each in enumerate(rounds)
        ]


def _tokens(acceptance: float, num_drafts: int) -> float:
    """Of a step: its own and the drafts up to the first wrong one."""
    return sum(acceptance**place for place in range(num_drafts + 1))


def _needed(cost: float, num_drafts: int) -> str:
    """The acceptance at which drafts neither gain nor lose, by bisection."""
    if cost > num_drafts + 1:
        return "none"
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if _tokens(middle, num_drafts) < cost else (low, middle)
    return f"{high:.0%}"
