"""What ranks send each other for a token, from the configuration alone. No torch; `link.Traffic` counts what they do.

All numbers are bytes that all ranks together send. What goes to several ranks counts for each of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qnext.config import ModelConfig
from qnext.parallel.mesh import Mesh
from qnext.parallel.shard import VECTOR

CPU_VALUE_BYTES = 4  # of an activation


@dataclass(frozen=True)
class TokenTraffic:
    """Of one token in each part: a mixer of either kind, a feed-forward of either kind; `head` is of a row of logits.

    Cut matrices gather their inputs and their outputs, so that no sum is split. Of a sparse layer the result of every
    chosen expert, the shared one included, goes to all ranks.
    """

    embedding: int
    linear: int
    full: int
    sparse: int
    dense: int
    head: int

    @classmethod
    def of(cls, config: ModelConfig, mesh: Mesh, *, value_bytes: int = CPU_VALUE_BYTES) -> TokenTraffic:
        """Activations have `value_bytes` each; logits too."""

        def gathered(*lengths: int, unit: int = 1) -> int:
            """All send each part, as wide as the widest, to the others of their group."""
            widest = sum(max(mesh.widths(length, unit=unit)) for length in lengths)
            return mesh.num_ranks * (mesh.tensor - 1) * widest * value_bytes

        hidden = config.hidden_size
        output = gathered(hidden)
        chosen = config.num_experts_per_tok + (config.shared_expert_intermediate_size > 0)
        return cls(
            embedding=mesh.num_ranks * (mesh.tensor - 1) * hidden * value_bytes,
            linear=gathered(config.linear_value_dim) + output,
            full=gathered(config.num_attention_heads * config.head_dim) + output,
            sparse=chosen * hidden * (mesh.num_ranks - 1) * value_bytes if config.num_experts else 0,
            dense=gathered(config.intermediate_size, unit=VECTOR) + output,
            head=gathered(config.vocab_size),
        )

    def layers(self, config: ModelConfig) -> int:
        """Of a token in all layers of the trunk."""
        num_sparse = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
        mixers = config.num_linear_layers * self.linear + config.num_full_layers * self.full
        return mixers + num_sparse * self.sparse + (config.num_hidden_layers - num_sparse) * self.dense

    def decoded(self, config: ModelConfig) -> int:
        """Of a token that is decoded without drafts."""
        return self.embedding + self.layers(config) + self.head

    def drafted(self, config: ModelConfig) -> int:
        """Of a token that the MTP layer drafts, beside those of verifying it; 0 without such a layer."""
        if not config.num_nextn_predict_layers:
            return 0
        return self.embedding + self.full + (self.sparse if config.num_experts else self.dense) + self.head

    def document(self, config: ModelConfig) -> dict[str, int]:
        """For programs."""
        return {**asdict(self), "decoded": self.decoded(config), "drafted": self.drafted(config)}
