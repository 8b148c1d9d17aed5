"""LoraConfig: which matrices are adapted, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qnext.errors import UsageError
from qnext.planning import Kind, ParameterInfo

Targets = Literal["all", "attention", "experts"]

MIXERS = frozenset(
    {
        Kind.QUERY,
        Kind.KEY,
        Kind.VALUE,
        Kind.ATTENTION_OUT,
        Kind.DELTA_QKVZ,
        Kind.DELTA_BA,
        Kind.DELTA_OUT,
    }
)
ROUTED = frozenset({Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN})
FEED_FORWARDS = ROUTED | frozenset(
    {
        Kind.MLP_GATE,
        Kind.MLP_UP,
        Kind.MLP_DOWN,
        Kind.SHARED_GATE,
        Kind.SHARED_UP,
        Kind.SHARED_DOWN,
        Kind.SHARED_SCALE,
    }
)
_KINDS: Mapping[str, frozenset[Kind]] = {
    "all": MIXERS | FEED_FORWARDS,
    "attention": MIXERS,
    "experts": FEED_FORWARDS,
}
ADAPTABLE = _KINDS["all"] | {Kind.ROUTER}


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter changes. Raises UsageError naming the field when a value is impossible.

    "attention" are the projections of attention and Gated DeltaNet, "experts" those of routed and shared experts and of
    dense feed-forwards. A matrix W [F, D] becomes W + alpha / rank * B A, with A [rank, D] and B [F, rank].
    """

    targets: Targets = "all"
    rank: int = 8  # of a matrix with fewer rows or columns: their number; alpha / rank stays
    alpha: float = 16.0
    # Routed experts of a layer share A of gate_up and B of down, so that a rank costs a quarter; otherwise each expert
    # has all factors of its own.
    shares_outer: bool = True
    experts: Mapping[int, tuple[int, ...]] | None = None  # by layer: the routed experts that are adapted; None: all
    router: bool = False  # the routers too, whose choice the server then makes otherwise
    mtp: bool = True  # the layer of multi-token prediction too, where there is one

    def __post_init__(self) -> None:
        if self.targets not in _KINDS:
            raise UsageError(f"targets must be one of {', '.join(_KINDS)}, not {self.targets!r}")
        if self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        if not 0.0 < self.alpha < float("inf"):
            raise UsageError(f"alpha must be positive, not {self.alpha}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def wants(self, info: ParameterInfo) -> bool:
        """Whether a parameter is adapted."""
        is_wanted = info.kind in _KINDS[self.targets] or (self.router and info.kind is Kind.ROUTER)
        return is_wanted and (self.mtp or info.part != "mtp")
