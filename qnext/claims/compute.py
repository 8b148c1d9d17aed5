"""C2: what training costs beside the compared models: operations, and the efficiency that the published hours imply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from qnext.claims.claim import Findings, Grid, Workplace, exactly
from qnext.claims.notebook import Measured, Point
from qnext.config import preset
from qnext.planning.flops import training_compute_ratio

_OURS = "80b-a3b"
_TOKENS = {"qwen3-32b": 36e12, "qwen3-30b-a3b": 36e12}  # Qwen3's corpus; ours were 15e12 of them
_OUR_TOKENS = 15e12
_PUBLISHED_PERCENT = {"qwen3-32b": 9.3, "qwen3-30b-a3b": 80.0}


@dataclass(frozen=True)
class TrainingCompute:
    """Ratios of operations at several lengths of the training sequences."""

    lengths: tuple[int, ...]

    def points(self, at: Workplace) -> Iterable[Point]:
        return [
            Point(f"compute/{other}/{length}/{'mtp' if with_mtp else 'trunk'}", {}, _ratio(other, length, with_mtp))
            for other in _TOKENS
            for length in self.lengths
            for with_mtp in (False, True)
        ]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        values, rows = {}, []
        for other, published in _PUBLISHED_PERCENT.items():
            for length in self.lengths:
                trunk, whole = (known.get(f"compute/{other}/{length}/{part}") for part in ("trunk", "mtp"))
                if trunk is None or whole is None:
                    continue
                shares = (100 * trunk.value, 100 * whole.value)
                implied = [share / published for share in shares]
                rows.append(
                    [
                        other,
                        f"{length:,}",
                        *(f"{share:.1f} %" for share in shares),
                        f"{published:g} %",
                        f"{implied[0]:.2f} to {implied[1]:.2f}",
                    ]
                )
                if length == self.lengths[0]:
                    values[f"percent_of_{other}"] = exactly(shares[1])
                    values[f"implied_efficiency_{other}"] = exactly(implied[1])
        header = [
            "compared with",
            "sequence length",
            "operations",
            "with MTP",
            "published (hours)",
            "implied efficiency",
        ]
        return Findings(
            f"The planner's operations of training a token, times the tokens: {_OUR_TOKENS:.0e} here, "
            f"{_TOKENS['qwen3-32b']:.1e} of Qwen3's corpus for the compared models.",
            values,
            [Grid("Training compute of Qwen3-Next-80B-A3B over that of a compared model", header, rows)],
            notes=[
                "Operations alone do not give the published shares, which are hours. Their quotient is how well the "
                "hardware was used on this architecture, over how well it was on the other: about one half. Both "
                "published shares agree on that."
            ],
        )


def _ratio(other: str, length: int, with_mtp: bool) -> Callable[[], float]:
    def measure() -> float:
        return training_compute_ratio(
            preset(_OURS),
            preset(other),
            sequence_length=length,
            tokens=_OUR_TOKENS,
            other_tokens=_TOKENS[other],
            with_mtp=with_mtp,
        )

    return measure
