"""ModelConfig: every number that decides the shape and the arithmetic of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qnext.errors import ConfigError

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"


def hybrid_pattern(num_layers: int, *, interval: int) -> tuple[str, ...]:
    """Layer kinds with full attention at every `interval`-th layer, counted from one.

    >>> hybrid_pattern(4, interval=4)
    ('linear_attention', 'linear_attention', 'linear_attention', 'full_attention')
    """
    if interval < 1:
        raise ConfigError(f"full_attention_interval must be at least 1, not {interval}")
    return tuple(FULL_ATTENTION if (i + 1) % interval == 0 else LINEAR_ATTENTION for i in range(num_layers))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as `rope_scaling` in config.json describes it.

    `attention_factor` None means 0.1 * ln(factor) + 1; it multiplies cos and sin.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ConfigError(f"rope_scaling.factor must be at least 1, not {self.factor}")
        if self.original_max_position_embeddings < 1:
            raise ConfigError("rope_scaling.original_max_position_embeddings must be positive")
        if not self.beta_slow > 0:
            raise ConfigError(f"rope_scaling.beta_slow must be positive, not {self.beta_slow}")
        if self.beta_fast <= self.beta_slow:
            raise ConfigError("rope_scaling.beta_fast must be larger than beta_slow")
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ConfigError(f"rope_scaling.attention_factor must be positive, not {self.attention_factor}")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Qwen3-Next, Qwen3 or Qwen3-MoE family, or an ablation of them.

    Field names are those of Hugging Face's config.json where it has one. The fields that it lacks are the
    ablation switches (`attention_output_gate`, `zero_centered_norm`, `mtp_uses_final_norm`).
    Raises ConfigError naming the field when the values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    # full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    max_position_embeddings: int
    partial_rotary_factor: float = 1.0
    rope_scaling: YarnScaling | None = None
    attention_bias: bool = False
    attention_output_gate: bool = True
    # Gated DeltaNet; all zero when no layer is linear attention
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    # feed-forward: dense where `is_moe_layer` is false
    intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    # norms, head, multi-token prediction
    rms_norm_eps: float = 1e-6
    zero_centered_norm: bool = True
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    mtp_uses_final_norm: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.has_linear_layers:
            _check_linear_attention(self)
        _check_feed_forward(self)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def has_linear_layers(self) -> bool:
        return LINEAR_ATTENTION in self.layer_types

    @property
    def num_linear_layers(self) -> int:
        return self.layer_types.count(LINEAR_ATTENTION)

    @property
    def num_full_layers(self) -> int:
        return self.layer_types.count(FULL_ATTENTION)

    @property
    def rotary_dim(self) -> int:
        """Leading dims of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """The number of positions that the model supports. A config.json with YaRN rarely raises
        max_position_embeddings."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        stretched = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def linear_key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_dim(self) -> int:
        """Channels of the short convolution: all q, then all k, then all v."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def is_moe_layer(self, layer_index: int) -> bool:
        """Whether the feed-forward of trunk layer `layer_index` (from zero) is a mixture of experts."""
        return (
            self.num_experts > 0
            and layer_index not in self.mlp_only_layers
            and (layer_index + 1) % self.decoder_sparse_step == 0
        )

    def with_(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed. All fields are checked again."""
        return replace(self, **changes)

    def with_layers(self, num_layers: int) -> ModelConfig:
        """The same model with another depth: the layer pattern is repeated or cut."""
        if num_layers < 1:
            raise ConfigError(f"num_hidden_layers must be at least 1, not {num_layers}")
        period = _period(self.layer_types)
        layer_types = tuple(period[i % len(period)] for i in range(num_layers))
        mlp_only = tuple(i for i in self.mlp_only_layers if i < num_layers)
        return replace(self, layer_types=layer_types, mlp_only_layers=mlp_only)

    def with_yarn(self, factor: float) -> ModelConfig:
        """The same model with its context stretched by static YaRN. The base is the present context."""
        original = self.max_position_embeddings
        if self.rope_scaling is not None:
            original = self.rope_scaling.original_max_position_embeddings
        scaling = YarnScaling(factor=factor, original_max_position_embeddings=original)
        return replace(self, rope_scaling=scaling, max_position_embeddings=int(original * factor))


def _period(layer_types: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest prefix whose repetition gives `layer_types`."""
    num_layers = len(layer_types)
    for size in range(1, num_layers + 1):
        if all(layer_types[i] == layer_types[i % size] for i in range(num_layers)):
            return layer_types[:size]
    return layer_types


def _require_positive(config: ModelConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ConfigError(f"{name} must be positive, not {value}")


def _require_not_negative(config: ModelConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= 0:
            raise ConfigError(f"{name} must not be negative, but is {value}")


def _require_multiple(config: ModelConfig, name: str, of: str) -> None:
    if getattr(config, name) % getattr(config, of):
        raise ConfigError(f"{name} ({getattr(config, name)}) must be a multiple of {of} ({getattr(config, of)})")


def _check_sizes(config: ModelConfig) -> None:
    _require_positive(
        config,
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    _require_not_negative(config, "intermediate_size", "initializer_range", "router_aux_loss_coef")
    if not config.rope_theta > 1.0:
        raise ConfigError(f"rope_theta must be above 1, not {config.rope_theta}")
    if not config.layer_types:
        raise ConfigError("num_hidden_layers must be at least 1, not 0")
    for kind in config.layer_types:
        if kind not in (LINEAR_ATTENTION, FULL_ATTENTION):
            raise ConfigError(f"layer_types holds {kind!r}; known are {LINEAR_ATTENTION!r} and {FULL_ATTENTION!r}")
    _require_multiple(config, "num_attention_heads", "num_key_value_heads")
    if not 0.0 < config.partial_rotary_factor <= 1.0 or config.rotary_dim % 2 or config.rotary_dim == 0:
        raise ConfigError(
            f"partial_rotary_factor {config.partial_rotary_factor} of head_dim {config.head_dim} "
            "must give an even, positive number of rotary dims"
        )
    if config.num_nextn_predict_layers not in (0, 1):
        raise ConfigError(f"num_nextn_predict_layers must be 0 or 1, not {config.num_nextn_predict_layers}")
    for name in ("bos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.vocab_size:
            raise ConfigError(f"{name} {token} is outside the vocabulary of {config.vocab_size}")
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(f"eos_token_id {token} is outside the vocabulary of {config.vocab_size}")


def _check_linear_attention(config: ModelConfig) -> None:
    _require_positive(
        config,
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    )
    _require_multiple(config, "linear_num_value_heads", "linear_num_key_heads")


def _check_feed_forward(config: ModelConfig) -> None:
    _require_positive(config, "decoder_sparse_step")
    for layer in config.mlp_only_layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise ConfigError(f"mlp_only_layers names layer {layer} of {config.num_hidden_layers}")
    _require_not_negative(config, "num_experts", "shared_expert_intermediate_size")
    if config.num_experts > 0:
        _require_positive(config, "num_experts_per_tok", "moe_intermediate_size")
        if config.num_experts_per_tok > config.num_experts:
            raise ConfigError(
                f"num_experts_per_tok ({config.num_experts_per_tok}) exceeds num_experts ({config.num_experts})"
            )
    has_dense = any(not config.is_moe_layer(i) for i in range(config.num_hidden_layers))
    if has_dense and config.intermediate_size <= 0:
        raise ConfigError("intermediate_size must be positive where a layer has no experts")
