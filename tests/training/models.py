"""Tiny random models with asymmetric sizes, and documents of random tokens."""

from __future__ import annotations

import numpy as np
import torch

from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from qnext.model import CausalLM, initialize

VOCAB, END = 53, 52


def tiny_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "layer_types": (LINEAR_ATTENTION, FULL_ATTENTION),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 256,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> CausalLM:
    model = CausalLM(tiny_config(**changes))
    initialize(model, seed=seed)
    return model.to(dtype)


def documents(lengths: list[int], *, seed: int = 0) -> list[np.ndarray]:
    """Documents of these lengths, the end token included."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, END, length - 1), END).astype(np.int32) for length in lengths]
