"""LoraConfig: which matrices are adapted, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qnext.config import ModelConfig
from qnext.errors import UsageError
from qnext.planning import Kind, ParameterInfo, list_parameters

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

    def num_parameters(self, config: ModelConfig) -> int:
        """Of the factors of a model of this configuration."""
        return sum(self._numbers(info) for info in list_parameters(config).values() if self.wants(info))

    def _numbers(self, info: ParameterInfo) -> int:
        rows, columns = info.block_shape
        rank = min(self.rank, rows, columns)
        if info.expert_axis is None:
            return rank * (rows + columns)
        num_experts = info.shape[0] if self.experts is None else len(self.experts.get(info.layer or 0, ()))
        if not self.shares_outer or not num_experts:
            return num_experts * rank * (rows + columns)
        shared, own = (columns, rows) if info.kind is Kind.EXPERTS_GATE_UP else (rows, columns)
        return rank * (shared + num_experts * own)

    def wants(self, info: ParameterInfo) -> bool:
        """Whether a parameter is adapted."""
        is_wanted = info.kind in _KINDS[self.targets] or (self.router and info.kind is Kind.ROUTER)
        return is_wanted and (self.mtp or info.part != "mtp")
