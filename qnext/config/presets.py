"""Named configurations: the released models and a family of small ones that keep their proportions."""

from __future__ import annotations

from collections.abc import Callable

from qnext.config.model import FULL_ATTENTION, ModelConfig, hybrid_pattern
from qnext.errors import ModelNotFound, did_you_mean

_BOS, _EOS = 151643, 151645


def _qwen3_next_80b_a3b() -> ModelConfig:
    """Qwen/Qwen3-Next-80B-A3B: Instruct, Thinking and Coder-Next share these values (their config.json)."""
    return ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        layer_types=hybrid_pattern(48, interval=4),
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        partial_rotary_factor=0.25,
        rope_theta=10_000_000.0,
        max_position_embeddings=262_144,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        intermediate_size=5120,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_nextn_predict_layers=1,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
    )


def _qwen3(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    experts: int = 0,
    experts_per_token: int = 0,
    expert_width: int = 0,
    rope_theta: float = 1_000_000.0,
) -> ModelConfig:
    """Qwen3 and Qwen3-MoE. Sizes from the published model cards; not compared with the released config.json."""
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        layer_types=(FULL_ATTENTION,) * layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        rope_theta=rope_theta,
        max_position_embeddings=40_960,
        attention_output_gate=False,
        intermediate_size=intermediate,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=expert_width,
        zero_centered_norm=False,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
    )


def _family(
    *,
    hidden: int,
    layers: int,
    experts: int,
    top_k: int,
    vocab: int,
    linear_heads: tuple[int, int, int],
    attention_heads: tuple[int, int, int],
) -> ModelConfig:
    """A small Qwen3-Next: expert width d/4, key dim d, value dim 2d, query dim 2d, one shared expert, tied head.

    `linear_heads` is (key heads, value heads, head dim); `attention_heads` is (query heads, KV heads, head dim).
    """
    key_heads, value_heads, linear_dim = linear_heads
    query_heads, kv_heads, head_dim = attention_heads
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        layer_types=hybrid_pattern(layers, interval=4),
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        partial_rotary_factor=0.25,
        rope_theta=10_000.0,
        max_position_embeddings=8192,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=linear_dim,
        linear_value_head_dim=linear_dim,
        linear_conv_kernel_dim=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=hidden // 4,
        shared_expert_intermediate_size=hidden // 4,
        tie_word_embeddings=True,
        num_nextn_predict_layers=1,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "80b-a3b": _qwen3_next_80b_a3b,
    "qwen3-32b": lambda: _qwen3(layers=64, hidden=5120, heads=64, kv_heads=8, intermediate=25600),
    "qwen3-30b-a3b": lambda: _qwen3(
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        intermediate=6144,
        experts=128,
        experts_per_token=8,
        expert_width=768,
    ),
    "qwen3-235b-a22b": lambda: _qwen3(
        layers=94,
        hidden=4096,
        heads=64,
        kv_heads=4,
        intermediate=12288,
        experts=128,
        experts_per_token=8,
        expert_width=1536,
    ),
    "nano-5m": lambda: _family(
        hidden=128, layers=4, experts=64, top_k=4, vocab=4096, linear_heads=(4, 8, 32), attention_heads=(4, 1, 64)
    ),
    "micro-20m": lambda: _family(
        hidden=192, layers=8, experts=64, top_k=4, vocab=8192, linear_heads=(3, 6, 64), attention_heads=(6, 2, 64)
    ),
    "mini-90m": lambda: _family(
        hidden=256, layers=12, experts=128, top_k=8, vocab=16384, linear_heads=(4, 8, 64), attention_heads=(8, 2, 64)
    ),
    "small-200m": lambda: _family(
        hidden=384, layers=12, experts=128, top_k=8, vocab=16384, linear_heads=(3, 6, 128), attention_heads=(6, 2, 128)
    ),
    "base-450m": lambda: _family(
        hidden=512, layers=16, experts=128, top_k=8, vocab=32768, linear_heads=(4, 8, 128), attention_heads=(8, 2, 128)
    ),
    "large-1b": lambda: _family(
        hidden=512,
        layers=20,
        experts=256,
        top_k=10,
        vocab=32768,
        linear_heads=(4, 8, 128),
        attention_heads=(8, 2, 128),
    ),
    "ultra-1b-512e": lambda: _family(
        hidden=384,
        layers=16,
        experts=512,
        top_k=10,
        vocab=32768,
        linear_heads=(3, 6, 128),
        attention_heads=(6, 2, 128),
    ),
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`; ModelNotFound lists the known names."""
    if name not in PRESETS:
        raise ModelNotFound(f"no preset {name!r}; known: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]()
