"""Tiny random models of every kind, with sizes that differ from each other and that native kernels take."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from qnext.config import ModelConfig, hybrid_pattern
from qnext.model import Batch, CausalLM, initialize
from qnext.ops import backends

VOCAB_SIZE = 97
NATIVE = "next, sizes of the native kernels"  # of tests.model.models
needs_native = pytest.mark.skipif(
    backends.cpu_kernels() is None, reason="the native kernels are not built or not wanted"
)
KINDS = ("hybrid", "full", "linear", "dense")

_LAYER_TYPES = {
    "hybrid": hybrid_pattern(3, interval=3),
    "full": ("full_attention",) * 2,
    "linear": ("linear_attention",) * 2,
    "dense": ("full_attention", "linear_attention"),
}


@cache
@torch.inference_mode(False)  # whoever asks first: later ones may want gradients
def tiny_model(kind: str) -> CausalLM:
    """A random fp32 model whose logits differ well beyond rounding between tokens."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        layer_types=_LAYER_TYPES[kind],
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        partial_rotary_factor=0.25,
        rope_theta=10_000.0,
        max_position_embeddings=512,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        intermediate_size=128,
        num_experts=0 if kind == "dense" else 5,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=160,
        initializer_range=0.25,
        eos_token_id=3,
    )
    model = CausalLM(config).eval()
    initialize(model, seed=len(kind))
    return model


@torch.inference_mode()
def reference_logits(model: CausalLM, token_ids: list[int] | tuple[int, ...]) -> torch.Tensor:
    """[T, Y] of the whole sequence at once, without any cache."""
    batch = Batch.from_lengths(torch.tensor(token_ids), [len(token_ids)])
    return model.logits(model(batch).hidden_TD).to(torch.float32)


def reference_greedy(model: CausalLM, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    """Greedy continuation by full recomputation for every token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


def random_prompt(length: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
