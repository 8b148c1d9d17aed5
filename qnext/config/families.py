"""The families that are read: their names, and what an absent key of config.json means for each.

The defaults are those of transformers 5 (configuration_qwen3_next.py, configuration_qwen3_moe.py,
configuration_qwen3.py), where 4.51 to 4.57, which wrote the released files, agree with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LINEAR_KEYS = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
EXPERT_KEYS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)
COMMON_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
)
SWITCH_KEYS = ("attention_output_gate", "zero_centered_norm", "mtp_uses_final_norm")
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
OTHER_KEYS = (
    "num_hidden_layers",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "intermediate_size",
    "initializer_range",
    "router_aux_loss_coef",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class Family(NamedTuple):
    """One `model_type`. `defaults` holds what the reference implementation takes for a key that a file leaves out."""

    title: str
    architecture: str
    base: str  # the class without a head, which some files name
    has_experts: bool
    is_hybrid: bool  # Gated DeltaNet layers, a shared expert, multi-token prediction
    defaults: dict[str, Any]

    @property
    def keys(self) -> frozenset[str]:
        """Keys of config.json that decide the arithmetic of this family."""
        keys = {*COMMON_KEYS, *OTHER_KEYS}
        if self.has_experts:
            keys |= {*EXPERT_KEYS, "num_local_experts"}
        if self.is_hybrid:
            keys |= {*LINEAR_KEYS, "full_attention_interval", "shared_expert_intermediate_size"}
        return frozenset(keys)


_SHARED: dict[str, Any] = {
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "num_attention_heads": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "Qwen3NextModel",
        True,
        True,
        {
            **_SHARED,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts_per_tok": 10,
            "num_experts": 512,
            "norm_topk_prob": True,
            "full_attention_interval": 4,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeModel",
        True,
        False,
        {
            **_SHARED,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": False,
        },
    ),
    "qwen3": Family(
        "Qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Model",
        False,
        False,
        {
            **_SHARED,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
    ),
    # Ablations, which no other program writes: every key is there.
    "qnext": Family("ablations of them", "QnextForCausalLM", "QnextModel", True, True, {}),
}
ARCHITECTURES = {model_type: family.architecture for model_type, family in FAMILIES.items()}
