"""Released configuration files, and what their reference implementations take them for."""

from __future__ import annotations

import json
import warnings
from typing import Any

from qnext.config import ModelConfig, from_hf
from qnext.config.families import FAMILIES
from qnext.errors import QnextWarning


def released_80b() -> dict[str, Any]:
    """The config.json of the released 80B-A3B Instruct: its keys and values, no more and no fewer."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


_QWEN3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "max_window_layers": 48,
}
# The released files of the other families: keys and values.
RELEASED: dict[str, dict[str, Any]] = {
    "80B-A3B-Instruct": released_80b(),
    "30B-A3B": _MOE,
    "Coder-30B-A3B": {
        **without(_MOE, "attention_bias", "bos_token_id"),
        "intermediate_size": 5472,
        "max_position_embeddings": 262144,
        "max_window_layers": 28,
        "qkv_bias": False,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0,
        "transformers_version": "4.52.3",
        "use_qk_norm": True,
    },
    "235B-A22B": {
        **_MOE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
        "max_window_layers": 94,
    },
    "0.6B": {
        **_QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "32B": {
        **_QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_window_layers": 64,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
CLASSES = {"qwen3_next": "Qwen3NextConfig", "qwen3_moe": "Qwen3MoeConfig", "qwen3": "Qwen3Config"}


def quiet(values: dict[str, Any], **more: Any) -> ModelConfig:
    """The configuration, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", QnextWarning)
        return from_hf(values, **more)


def of_reference(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers' class makes of the keys that decide the arithmetic."""
    import transformers

    theirs = getattr(transformers, CLASSES[values["model_type"]])(**json.loads(json.dumps(values)))
    rope = theirs.rope_parameters
    layers = getattr(theirs, "layer_types", None) or ["full_attention"] * theirs.num_hidden_layers
    found = {
        "layer_types": tuple(layers),
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        # The attention of Qwen3-MoE asks for head_dim this way.
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
    }
    for key in FAMILIES[values["model_type"]].keys & set(ModelConfig.__dataclass_fields__) - {*found}:
        if hasattr(theirs, key):
            value = getattr(theirs, key)
            found[key] = tuple(value) if isinstance(value, list) else value
    return found | {"rope_scaling": None}


def assert_same(config: ModelConfig, values: dict[str, Any]) -> None:
    expected = of_reference(values)
    assert {key: getattr(config, key) for key in expected} == expected
