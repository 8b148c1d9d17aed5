"""What each rank of a model holds, and what ranks send each other: from a configuration and bytes by part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from qnext.config import ModelConfig
from qnext.parallel.mesh import Mesh, check_mesh
from qnext.parallel.shard import RankShard
from qnext.parallel.traffic import TokenTraffic
from qnext.planning import ParameterInfo, list_parameters
from qnext.planning.counts import kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.machine import format_bytes
from qnext.session.planned import PlannedModel


class RankPlan(NamedTuple):
    """`weight_bytes` of each rank; keys and values of a token in bf16 and states of a sequence, on each of them."""

    mesh: Mesh
    config: ModelConfig
    weight_bytes: tuple[int, ...]
    kv_per_token: int
    state_bytes: int
    traffic: TokenTraffic

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tensor_parallel": self.mesh.tensor,
            "expert_parallel": self.mesh.expert,
            "weight_bytes": list(self.weight_bytes),
            "kv_bytes_per_token": self.kv_per_token,
            "state_bytes_per_sequence": self.state_bytes,
            "sent_bytes": self.traffic.document(self.config),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        sent, mesh = self.traffic, self.mesh
        yield (
            f"  on {mesh.num_ranks} ranks, {mesh.tensor} x {mesh.expert}: weights of each {_range(self.weight_bytes)}, "
            f"keys and values of a token {self.kv_per_token / 1024:.1f} KiB, states of a sequence "
            f"{format_bytes(self.state_bytes)}"
        )
        parts = {
            "the embedding": sent.embedding,
            "a linear layer's mixer": sent.linear * self.config.has_linear_layers,
            "a full layer's": sent.full * (self.config.num_full_layers > 0),
            "experts": sent.sparse,
            "a dense MLP": sent.dense * (not all(map(self.config.is_moe_layer, range(self.config.num_hidden_layers)))),
            "logits": sent.head,
        }
        each = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)
        yield f"  all ranks send for a decoded token {format_bytes(sent.decoded(self.config))}: {each}"


def plan_ranks(model: PlannedModel, mesh: Mesh) -> RankPlan:
    """Raises UsageError for a model that cannot be cut so."""
    config = model.config
    check_mesh(config, mesh)
    shards = [RankShard.of(config, mesh._replace(rank=rank)) for rank in range(mesh.num_ranks)]
    own = shards[0].config
    states = state_bytes_per_sequence(own)
    return RankPlan(
        mesh,
        config,
        tuple(_weight_bytes(model, shard) for shard in shards),
        kv_bytes_per_token(own),
        states.total,
        TokenTraffic.of(config, mesh),
    )


def _weight_bytes(model: PlannedModel, shard: RankShard) -> int:
    """Of each part the bytes of as many of its numbers as the rank has."""
    by_part: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in list_parameters(model.config).values():
        by_part[info.part].append(info)
    return round(sum(model.part_bytes[part] * shard.share_of(infos) for part, infos in by_part.items()))


def _range(counts: tuple[int, ...]) -> str:
    least, most = format_bytes(min(counts)), format_bytes(max(counts))
    return least if least == most else f"{least} to {most}"
