"""The native kernels against the reference, on small random numbers: whether this machine computes correctly.

Legend: T tokens, D inputs, F outputs, E experts, A experts per token, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext import ops
from qnext.diagnostics.finding import Finding
from qnext.ops import reference
from qnext.ops.quantized import pack_codes

_NUM_TOKENS, _DIM, _PAGE = 5, 64, 16
# Relative RMS. Native kernels round activations as the weight asks: to bf16, or to int8 with a scale per group; the
# reference does not. The bounds are those of the tests, with room for three roundings in a row.
_FP32, _BF16, _INT8 = 1e-5, 1e-2, 4e-2


class _Case(NamedTuple):
    name: str
    actual: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    tolerance: float


def kernel_errors() -> dict[str, tuple[float, float]]:
    """The relative RMS of each op's difference from the reference, and the largest correct value."""
    torch_state = torch.random.get_rng_state()
    try:
        with torch.inference_mode():
            torch.manual_seed(0)
            return {case.name: (_relative(case.actual(), case.expected()), case.tolerance) for case in _cases()}
    finally:
        torch.random.set_rng_state(torch_state)


def self_test() -> Finding:
    """One line: all ops are correct, or which ops are not."""
    errors = kernel_errors()
    wrong = [name for name, (error, tolerance) in errors.items() if not error <= tolerance]
    text = ", ".join(f"{name} {error:.0e}" for name, (error, _) in errors.items())
    data = {name: {"error": error, "tolerance": tolerance} for name, (error, tolerance) in errors.items()}
    if wrong:
        advice = f"QNEXT_BACKEND=torch computes without them; please report {', '.join(wrong)}"
        return Finding("kernel test", "problem", f"differ from the reference: {text}", advice, data)
    return Finding("kernel test", "ok", f"as the reference: {text}", data=data)


def _relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return (difference / expected.double().square().mean().sqrt()).item()


def _cases() -> Iterator[_Case]:
    x_TD, weight_FD, norm_D = torch.randn(_NUM_TOKENS, _DIM), torch.randn(48, _DIM), torch.randn(_DIM)
    bf16_FD = weight_FD.bfloat16()
    packed, plain = _int4(48, _DIM)
    norm: dict[str, Any] = {"eps": 1e-6, "zero_centered": True}
    for name, weight, wanted, tolerance in (
        ("linear fp32", weight_FD, weight_FD, _FP32),
        ("linear bf16", bf16_FD, bf16_FD.float(), _BF16),
        ("linear int4", packed, plain, _INT8),
    ):
        yield _Case(
            name,
            lambda weight=weight: ops.linear(x_TD, weight),  # type: ignore[misc]
            lambda wanted=wanted: reference.linear(x_TD, wanted),  # type: ignore[misc]
            tolerance,
        )
    yield _Case(
        "norm",
        lambda: ops.rms_norm(x_TD, norm_D, **norm),
        lambda: reference.rms_norm(x_TD, norm_D, **norm),
        _FP32,
    )
    yield _experts(x_TD)
    yield _delta()
    yield _attention()


def _int4(num_outputs: int, num_inputs: int) -> tuple[Tensor | ops.Weight, Tensor]:
    codes = torch.randint(16, (num_outputs, num_inputs), dtype=torch.uint8)
    source = ops.QuantizedWeight(pack_codes(codes, bits=4), torch.rand(num_outputs, num_inputs // 32) + 0.5, 4, 32)
    packed = ops.empty_quantized(
        (num_outputs, num_inputs), bits=4, group_size=32, scale_dtype=torch.float32, has_zeros=False
    )
    ops.write_quantized(packed, source)
    return packed, source.dequantize()


def _experts(x_TD: Tensor) -> _Case:
    """Routing and experts together."""
    logits_TE, gate_up, down = torch.randn(_NUM_TOKENS, 8), torch.randn(8, 64, _DIM) / 8, torch.randn(8, _DIM, 32) / 6
    chosen: dict[str, Any] = {"top_k": 3, "norm_topk_prob": True}
    return _Case(
        "experts",
        lambda: ops.experts_swiglu(x_TD, gate_up, down, routing=ops.route(logits_TE, **chosen)),
        lambda: reference.experts_swiglu(
            x_TD, gate_up, down, routing=reference.route(logits_TE, **chosen), shared=None
        ),
        _FP32,
    )


def _delta() -> _Case:
    num_key_heads, num_heads, dim = 1, 2, 32
    channels = 2 * num_key_heads * dim + num_heads * dim
    convolution, gates = torch.randn(channels, 1, 4) / 2, (torch.rand(num_heads), torch.randn(num_heads) - 3)
    weights = ops.DeltaWeights(convolution, *gates, torch.rand(dim) + 0.5, 1e-6, num_key_heads, dim)
    packing = ops.Packing([_NUM_TOKENS])
    qkvz_TX, ba_TY = torch.randn(_NUM_TOKENS, channels + num_heads * dim), torch.randn(_NUM_TOKENS, 2 * num_heads)
    return _Case(
        "delta rule",
        lambda: ops.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing),
        lambda: reference.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing),
        _FP32,
    )


def _attention() -> _Case:
    num_heads, num_kv_heads, dim = 4, 2, 32
    q_TX, k_TY, v_TY = (torch.randn(_NUM_TOKENS, heads * dim) for heads in (2 * num_heads, num_kv_heads, num_kv_heads))
    rope = ops.rope_cos_sin(torch.arange(_NUM_TOKENS), ops.rope_frequencies(16, theta=1e4))
    norms = torch.randn(dim) / 5, torch.randn(dim) / 5
    weights = ops.AttentionWeights(*norms, eps=1e-6, zero_centered=True, has_gate=True, scale=dim**-0.5)
    packed: dict[str, Any] = {"rope": rope, "packing": ops.Packing([_NUM_TOKENS])}
    pages = (torch.zeros(1, num_kv_heads, _PAGE, dim), torch.zeros(1, num_kv_heads, _PAGE, dim))
    cache = ops.AttentionCache(
        *pages, None, None, torch.zeros(1, 1, dtype=torch.long), torch.tensor([_NUM_TOKENS]), torch.arange(_NUM_TOKENS)
    )
    return _Case(
        "attention",
        lambda: ops.attention_mixer(q_TX, k_TY, v_TY, weights, cache=cache, **packed),
        lambda: reference.attention_mixer(q_TX, k_TY, v_TY, weights, cache=None, **packed),
        _FP32,
    )
