"""Tiny models with nothing at a trivial value, their transformers twins, and a cache for one request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qnext import ops
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, YarnScaling, hybrid_pattern, to_hf
from qnext.model import Batch, CacheView, CausalLM, DeltaSlots, HoldsWeights, KVPages, initialize, named_weights
from qnext.ops import Packing
from qnext.ops.cpu.panels import PanelWeight
from qnext.quant.rounding import round_nearest
from qnext.quant.scheme import find_scheme

PAGE = 16


def next_config(**changes: Any) -> ModelConfig:
    """A Qwen3-Next whose sizes all differ, so that no swapped axis goes unnoticed."""
    fields: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "layer_types": hybrid_pattern(4, interval=4),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 512,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 4,
        "intermediate_size": 52,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "initializer_range": 0.15,
    }
    return ModelConfig(**{**fields, **changes})


def plain_config(**changes: Any) -> ModelConfig:
    """A Qwen3: full attention only, plain norms, no output gate, dense."""
    fields: dict[str, Any] = {
        "vocab_size": 89,
        "hidden_size": 40,
        "layer_types": (FULL_ATTENTION,) * 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 12,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 512,
        "attention_output_gate": False,
        "zero_centered_norm": False,
        "intermediate_size": 56,
        "initializer_range": 0.15,
    }
    return ModelConfig(**{**fields, **changes})


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64)
L, F = LINEAR_ATTENTION, FULL_ATTENTION

PEER_CONFIGS: dict[str, ModelConfig] = {
    "next": next_config(),
    "next, tied head, bias, raw top-k weights": next_config(
        tie_word_embeddings=True, attention_bias=True, norm_topk_prob=False
    ),
    "next, equal linear heads, conv 2, half rotary": next_config(
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=20,
        linear_value_head_dim=4,
        linear_conv_kernel_dim=2,
        partial_rotary_factor=0.5,
        num_key_value_heads=6,
    ),
    "next, all linear": next_config(layer_types=(L,) * 3),
    "next, all full, one KV head, whole rotary": next_config(
        layer_types=(F,) * 2, num_key_value_heads=1, partial_rotary_factor=1.0
    ),
    "next, any pattern, dense layers": next_config(
        layer_types=(F, L, L, F, L), mlp_only_layers=(1,), decoder_sparse_step=2
    ),
    "next, YaRN, wide conv": next_config(rope_scaling=YARN, linear_conv_kernel_dim=5, max_position_embeddings=256),
    "next, more experts than tokens in a step": next_config(
        num_experts=64, num_experts_per_tok=10, moe_intermediate_size=12
    ),
    "next, sizes of the native kernels": next_config(
        hidden_size=64,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    ),
    "qwen3": plain_config(),
    "qwen3_moe, sizes of the native kernels": plain_config(
        **{**MOE, "moe_intermediate_size": 32}, hidden_size=64, head_dim=32, num_key_value_heads=2
    ),
    "qwen3, tied head, bias, YaRN": plain_config(tie_word_embeddings=True, attention_bias=True, rope_scaling=YARN),
    "qwen3_moe": plain_config(**MOE),
    "qwen3_moe, raw top-k weights, dense layers": plain_config(
        **MOE, norm_topk_prob=False, mlp_only_layers=(0,), layer_types=(F,) * 4, decoder_sparse_step=2
    ),
}


@torch.no_grad()
def make_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model with random norms, biases and time constants, and logits of order one."""
    model = CausalLM(config)
    initialize(model, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "norm" in name.rsplit(".", 2)[-2] or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if name.endswith("A_log"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if name.endswith("conv1d.weight"):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def make_peer(model: CausalLM) -> Any:
    """The transformers model of the same family with the same weights."""
    import transformers

    values = to_hf(model.config, dtype="float32")
    family = values["architectures"][0].removesuffix("ForCausalLM")
    for key in ("architectures", "model_type", "num_nextn_predict_layers"):
        values.pop(key, None)
    peer_config = getattr(transformers, f"{family}Config")(**values, attn_implementation="eager")
    peer = getattr(transformers, f"{family}ForCausalLM")(peer_config).eval()
    ours = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    peer.load_state_dict(ours, strict=True)
    return peer


def random_tokens(config: ModelConfig, num_tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def logits_of(model: CausalLM, tokens_T: Tensor, lengths: list[int] | None = None) -> Tensor:
    return model.logits(model(Batch.from_lengths(tokens_T, lengths or [len(tokens_T)])).hidden_TD)


class OneRequest:
    """Cache of a single sequence. Pages lie in a scattered order among pages that hold NaN."""

    def __init__(self, model: CausalLM, max_tokens: int) -> None:
        config = model.config
        self.num_cached = 0
        num_pages = -(-max_tokens // PAGE)
        order = torch.randperm(2 * num_pages, generator=torch.Generator().manual_seed(3))
        self.table_M = order[:num_pages]
        kv_shape = (2 * num_pages, config.num_key_value_heads, PAGE, config.head_dim)
        full = [i for i, kind in enumerate(config.layer_types) if kind == FULL_ATTENTION]
        if model.mtp is not None:
            full.append(config.num_hidden_layers)
        nan = float("nan")
        self.kv = {
            i: KVPages(torch.full(kv_shape, nan, dtype=model.dtype), torch.full(kv_shape, nan, dtype=model.dtype))
            for i in full
        }
        conv_shape = (3, config.linear_conv_kernel_dim - 1, config.linear_conv_dim)
        state_shape = (3, config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
        wide = torch.promote_types(model.dtype, torch.float32)
        self.delta = {
            i: DeltaSlots(torch.full(conv_shape, nan, dtype=wide), torch.full(state_shape, nan, dtype=wide))
            for i, kind in enumerate(config.layer_types)
            if kind == LINEAR_ATTENTION
        }

    def batch(self, tokens_T: Tensor) -> Batch:
        """The next tokens of the request."""
        positions_T = torch.arange(self.num_cached, self.num_cached + len(tokens_T))
        view = CacheView(
            kv=self.kv,
            delta=self.delta,
            slots_N=torch.tensor([1]),
            is_fresh_N=torch.tensor([self.num_cached == 0]),
            block_tables_NM=self.table_M[None],
            context_lengths_N=torch.tensor([self.num_cached + len(tokens_T)]),
            write_index_T=self.table_M[positions_T // PAGE] * PAGE + positions_T % PAGE,
        )
        self.num_cached += len(tokens_T)
        return Batch(tokens_T, positions_T, Packing([len(tokens_T)]), view)


@torch.no_grad()
def make_in_form(name: str, form: str, **changes: Any) -> CausalLM:
    """A peer config's random model, with changes, whose matrices are in `form`: a dtype of torch or a scheme."""
    config = replace(PEER_CONFIGS[name], **changes)
    if not form.startswith("int"):
        return make_model(config, dtype=getattr(torch, form))
    model = make_model(config)
    scheme = find_scheme(form)
    for module in [module for module in model.modules() if isinstance(module, HoldsWeights)]:
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() < 2 or parameter.shape[-1] % 32 or parameter.shape[-2] < 32:
                continue
            stack = parameter.detach() if parameter.dim() == 3 else parameter.detach()[None]
            weight = ops.empty_quantized(
                tuple(parameter.shape), bits=scheme.bits, group_size=32, scale_dtype=torch.float32
            )
            for expert, matrix in enumerate(stack):
                rounded = round_nearest(matrix, scheme, scale_dtype=torch.float32)
                ops.write_quantized(weight, rounded, expert=expert if parameter.dim() == 3 else None)
            module.set_weight(key, weight)
    assert any(isinstance(weight, PanelWeight) for _, weight in named_weights(model))
    return model
