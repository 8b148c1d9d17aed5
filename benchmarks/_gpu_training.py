"""Training on GPU kernels: forward and backward of each op at the released sizes, and whole steps of a model.

Bytes are those that an op must move: what it is given and gives, forward and backward, and nothing in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext import ops
from qnext.config import ModelConfig, preset
from qnext.model import Batch, CausalLM, initialize
from qnext.ops import AttentionWeights, DeltaWeights, Packing, Rope, Routing
from qnext.planning.flops import training_flops


class TrainedSizes(NamedTuple):
    lengths: list[int]  # of the sequences of a micro batch
    hidden: int
    key_heads: int
    heads: int  # of values in Gated DeltaNet
    head_dim: int
    query_heads: int
    kv_heads: int
    attention_dim: int
    experts: int
    top_k: int
    width: int


RELEASED = TrainedSizes([4096, 4096], 2048, 16, 32, 128, 16, 2, 256, 64, 10, 512)
SMALLEST = TrainedSizes([3, 5], 32, 1, 2, 16, 2, 1, 16, 4, 2, 16)


def training_cases(sizes: TrainedSizes, device: torch.device) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, bytes and call of forward and backward, on rows in bf16 with parameters in fp32."""
    packing = Packing(sizes.lengths, device=device)
    num_tokens = packing.num_tokens

    def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, device=device) * 0.1).to(dtype).requires_grad_()

    def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [rows(*shape, dtype=torch.float32) for shape in shapes]

    x_TD, (norm_D,) = rows(num_tokens, sizes.hidden), parameters((sizes.hidden,))
    norm = lambda: ops.rms_norm(x_TD, norm_D, eps=1e-6, zero_centered=True)  # noqa: E731
    yield "rms_norm, trained", 5 * x_TD.nbytes, both(norm, x_TD, norm_D)
    channels = 2 * sizes.key_heads * sizes.head_dim + sizes.heads * sizes.head_dim
    tensors = parameters((channels, 1, 4), (sizes.heads,), (sizes.heads,), (sizes.head_dim,))
    delta = DeltaWeights(*tensors, eps=1e-6, num_key_heads=sizes.key_heads, key_head_dim=sizes.head_dim)
    qkvz_TX, ba_TY = rows(num_tokens, channels + sizes.heads * sizes.head_dim), rows(num_tokens, 2 * sizes.heads)
    mixer = lambda: ops.gated_delta_mixer(qkvz_TX, ba_TY, delta, packing=packing)  # noqa: E731
    out_bytes = 2 * num_tokens * sizes.heads * sizes.head_dim
    yield "gated_delta_mixer, trained", 3 * qkvz_TX.nbytes + 2 * out_bytes, both(mixer, qkvz_TX, ba_TY, *tensors)
    dim, norms = sizes.attention_dim, parameters((sizes.attention_dim,), (sizes.attention_dim,))
    attention = AttentionWeights(*norms, 1e-6, True, True, dim**-0.5)
    rope = Rope(*(torch.ones(num_tokens, dim // 8, device=device) for _ in range(2)))
    qkv = [rows(num_tokens, n * dim) for n in (2 * sizes.query_heads, sizes.kv_heads, sizes.kv_heads)]
    attend = lambda: ops.attention_mixer(*qkv, attention, rope=rope, packing=packing)  # noqa: E731
    yield "attention_mixer, trained", 3 * sum(x.nbytes for x in qkv) + qkv[0].nbytes, both(attend, *qkv, *norms)
    matrices = [rows(sizes.experts, 2 * sizes.width, sizes.hidden), rows(sizes.experts, sizes.hidden, sizes.width)]
    experts_TA = torch.rand(num_tokens, sizes.experts, device=device).topk(sizes.top_k).indices
    routing = Routing(rows(num_tokens, sizes.top_k, dtype=torch.float32), experts_TA)
    experts = lambda: ops.experts_swiglu(x_TD, *matrices, routing=routing)  # noqa: E731
    yield "experts_swiglu, trained", 3 * sum(x.nbytes for x in matrices) + 4 * x_TD.nbytes, both(experts, *matrices)


def both(op: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """Forward, and backward under equal weights of the results."""

    def call() -> Any:
        with torch.enable_grad():
            out = op()
            return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return call


def time_step(device: torch.device, *, is_smallest: bool, peak: float | None) -> dict[str, Any]:
    """Steps of large-1b in bf16 with AdamW: tokens in a second, and the share of the peak in operations that the
    formula of planning.flops counts (MFU)."""
    config, sequences, length = preset("large-1b").with_(num_nextn_predict_layers=0), 8, 4096
    if is_smallest:
        heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "num_attention_heads": 2}
        dims = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 16, "moe_intermediate_size": 16}
        small: dict[str, Any] = {"hidden_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
        config = config.with_(layer_types=config.layer_types[-2:], num_key_value_heads=1, **heads, **dims, **small)
        sequences, length = 1, 4
    taken = _step_seconds(config, sequences, length, device, repeats=1 if is_smallest else 5)
    tokens_per_second = sequences * length / taken
    flops = training_flops(config, sequence_length=length).total * tokens_per_second
    return {
        "model": "tiny" if is_smallest else "large-1b",
        "tokens_per_second": tokens_per_second,
        "flops": flops,
        "mfu": None if peak is None else flops / peak,
    }


def _step_seconds(config: ModelConfig, sequences: int, length: int, device: torch.device, *, repeats: int) -> float:
    with torch.enable_grad():
        model = CausalLM(config)
        initialize(model, seed=0)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
        tokens_T = torch.randint(0, config.vocab_size, (sequences * length,), device=device)

        def step() -> float:
            with torch.autocast(device.type, torch.bfloat16):
                hidden_TD = model(Batch.from_lengths(tokens_T, [length] * sequences)).hidden_TD
                loss = ops.cross_entropy_sum(hidden_TD, model.lm_head.weight, tokens_T.roll(-1)) / len(tokens_T)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()  # waits for the GPU

        step()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
