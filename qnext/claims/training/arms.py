"""The small models of the ablations: one base, and each arm what it changes of it. All arms get the same operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, hybrid_pattern
from qnext.planning.flops import FORWARD_PASSES, token_flops


def small_model(hidden: int, *, layers: int = 4, vocab_size: int = 2048) -> ModelConfig:
    """The proportions of the released model: three linear layers to a full one, value dims twice the key dims, four of
    32 experts and a shared one."""
    heads = hidden // 32
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        layer_types=hybrid_pattern(layers, interval=4),
        num_attention_heads=2 * heads,
        num_key_value_heads=1,
        head_dim=32,
        partial_rotary_factor=0.25,
        rope_theta=10_000.0,
        max_position_embeddings=8192,
        linear_num_key_heads=heads,
        linear_num_value_heads=2 * heads,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=hidden // 4,
        shared_expert_intermediate_size=hidden // 4,
        tie_word_embeddings=True,
        initializer_range=0.007,
    )


def recall_model(hidden: int) -> ModelConfig:
    """The same for problems of token ids: fewer experts, and a vocabulary of as many ids as these need."""
    return small_model(hidden, vocab_size=512).with_(num_experts=8, num_experts_per_tok=2, initializer_range=0.02)


@dataclass(frozen=True)
class Arm:
    """One of the models that are compared: what it changes of the base's configuration and of its training."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_balance: bool = False  # the balance of the experts is that of each micro batch, not of the step
    micro_batches: int = 2  # of a step

    def config(self, base: ModelConfig) -> ModelConfig:
        changes = dict(self.model)
        kinds = changes.pop("kinds", None)
        if kinds is not None:
            changes["layer_types"] = (kinds,) * base.num_hidden_layers
        return base.with_(**changes)


HYBRID = Arm("hybrid")
FULL = Arm("full", {"kinds": FULL_ATTENTION})
LINEAR = Arm("linear", {"kinds": LINEAR_ATTENTION})
HYBRID_UNGATED = Arm("hybrid, no gate", {"attention_output_gate": False})
FULL_UNGATED = Arm("full, no gate", {"kinds": FULL_ATTENTION, "attention_output_gate": False})
EXPERTS = {
    count: HYBRID if count == 32 else Arm(f"{count} experts", {"num_experts": count}) for count in (16, 32, 64, 128)
}
STEP_BALANCE = Arm("balance of the step", micro_batches=8)
MICRO_BALANCE = Arm("balance of a micro batch", micro_batches=8, micro_batch_balance=True)


@dataclass(frozen=True)
class RunBudget:
    """What every arm gets: operations of training, in steps of so many tokens. The learning rates are those of the
    demo, tuned for no arm.

    The delta rule counts token by token, as its definition: heads of 32 dims in chunks of 64 would take several times
    the arithmetic, which no model has to pay.
    """

    base: ModelConfig
    flops: float
    tokens_per_step: int = 2048
    sequence_length: int = 256
    lr: float = 2e-2
    muon_lr: float = 4e-3

    def steps(self, arm: Arm) -> int:
        """As many as the operations allow."""
        forward = token_flops(arm.config(self.base), context=(self.sequence_length + 1) / 2, with_mtp=True)
        return max(1, round(self.flops / (FORWARD_PASSES * forward.total * self.tokens_per_step)))

    def facts(self, arm: Arm, *, seed: int) -> dict[str, Any]:
        """What decides the result of a run."""
        config = asdict(arm.config(self.base))
        own = {name: value for name, value in asdict(self).items() if name != "base"}
        train = {
            "micro_batch_balance": arm.micro_batch_balance,
            "tokens_per_batch": self.tokens_per_step // arm.micro_batches,
        }
        return {"model": config, **own, **train, "steps": self.steps(arm), "seed": seed}
