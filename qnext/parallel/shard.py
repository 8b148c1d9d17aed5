"""What of each parameter a rank has, and the sizes of its model. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from qnext.config import ModelConfig
from qnext.parallel.mesh import Mesh
from qnext.parallel.placement import ExpertPlacement
from qnext.planning import Kind, ParameterInfo

VECTOR = 16  # numbers that kernels take at a time between the matrices of a dense MLP
Span = tuple[int, int]
_OF_SHARED_EXPERT = (Kind.SHARED_GATE, Kind.SHARED_UP, Kind.SHARED_DOWN)


@dataclass(frozen=True)
class RankShard:
    """The part of one rank. `whole` is the configuration of the model.

    What tensor parallelism cuts (`ParameterInfo.shard_axis`) is cut along its outputs, also where the inputs are split
    among ranks: the inputs are gathered before. So no sum is split, results keep their bits, and no group of codes that
    share a scale is cut. Experts are whole; the shared ones of the layers are dealt to the ranks in turn.
    """

    whole: ModelConfig
    mesh: Mesh
    placement: ExpertPlacement
    streamed: frozenset[int] = frozenset()  # layers whose experts stay on disk, with all numbers, also of other ranks

    @classmethod
    def of(cls, whole: ModelConfig, mesh: Mesh, placement: ExpertPlacement | None = None) -> RankShard:
        """With neighbouring experts together, where no placement is given."""
        return cls(whole, mesh, placement or ExpertPlacement(mesh.num_ranks, whole.num_experts))

    @cached_property
    def config(self) -> ModelConfig:
        """The sizes of the rank's mixers and caches. Vocabulary, hidden size and experts are those of the model."""
        whole, parts = self.whole, self.mesh.tensor
        return whole.with_(
            num_attention_heads=max(1, whole.num_attention_heads // parts),
            num_key_value_heads=max(1, whole.num_key_value_heads // parts),
            linear_num_key_heads=whole.linear_num_key_heads // parts,
            linear_num_value_heads=whole.linear_num_value_heads // parts,
        )

    def experts_of(self, layer: int) -> tuple[int, ...]:
        """The numbers of this rank's experts of a layer, in ascending order."""
        return self.placement.experts_of(layer, self.mesh.rank)

    def stacked(self, layer: int) -> tuple[int, ...]:
        """The numbers of the experts in the weights of this rank, in the order in which they are stacked."""
        return tuple(range(self.whole.num_experts)) if layer in self.streamed else self.experts_of(layer)

    def has_shared_expert(self, layer: int) -> bool:
        return self.owner_of_shared(layer) == self.mesh.rank

    def owner_of_shared(self, layer: int) -> int:
        """The rank that has the shared expert of a layer."""
        return layer % self.mesh.num_ranks

    def spans_of(self, info: ParameterInfo) -> list[Span]:
        """The rows of a parameter outside of the routed experts that this rank has, in the order of its own
        parameter."""
        if info.kind in _OF_SHARED_EXPERT and self.mesh.num_ranks > 1:
            assert info.layer is not None
            return [(0, info.shape[0])] if self.has_shared_expert(info.layer) else []
        if info.shard_axis is None or self.mesh.tensor == 1:
            return [(0, info.shape[0])]
        if self._is_of_kv_heads(info) and self.whole.num_key_value_heads < self.mesh.tensor:
            size = info.shape[0] // self.whole.num_key_value_heads
            head = self.mesh.part * self.whole.num_key_value_heads // self.mesh.tensor
            return [(head * size, (head + 1) * size)]
        spans, before = [], 0
        unit = VECTOR if info.kind in (Kind.MLP_GATE, Kind.MLP_UP) else 1
        for length in info.sections if info.shard_axis == 0 and info.sections else info.shape[:1]:
            start, end = self.mesh.span(length, unit=unit)
            spans.append((before + start, before + end))
            before += length
        return spans

    def info_of(self, info: ParameterInfo) -> ParameterInfo:
        """The parameter as it is on this rank."""
        if info.expert_axis is not None:
            assert info.layer is not None
            return info._replace(shape=(len(self.experts_of(info.layer)), *info.shape[1:]))
        return info._replace(shape=(sum(end - start for start, end in self.spans_of(info)), *info.shape[1:]))

    def num_values(self, info: ParameterInfo) -> int:
        return prod(self.info_of(info).shape)

    def share_of(self, infos: Iterable[ParameterInfo]) -> float:
        """Which part of the numbers of these parameters is on this rank; 1 where there are none."""
        known = list(infos)
        return sum(map(self.num_values, known)) / (sum(prod(info.shape) for info in known) or 1) if known else 1.0

    def _is_of_kv_heads(self, info: ParameterInfo) -> bool:
        if info.kind is Kind.BIAS:
            return info.shape[0] == self.whole.num_key_value_heads * self.whole.head_dim
        return info.kind in (Kind.KEY, Kind.VALUE)
