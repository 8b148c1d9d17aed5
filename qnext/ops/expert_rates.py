"""How fast experts are computed here and now, with the threads of ops.set_num_threads: by few rows and by many.

A share of what a plain loop reads would not do: where other programs use the cores, products of many threads lose more
than loops do. So the products themselves are timed, on weights of nothing in particular.

Legend: T tokens, D hidden, F expert width, E experts, A experts per token.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.dispatch import experts_swiglu
from qnext.ops.records import Routing
from qnext.ops.storage import empty_quantized
from qnext.ops.weights import Weight

_GROUP = 32
_ROWS, _MOST_EXPERTS = 40, 32  # of a prompt's products: rows of each expert, and experts
_MOST_STORED = 1024  # experts: small ones are in caches in their models too
_TOKENS = 64  # that are decoded


class KernelRates(NamedTuple):
    """In a second: bytes of weights that tokens multiply one after the other, and operations of many tokens at once."""

    memory: float
    arithmetic: float


def expert_rates(
    *, hidden_size: int, width: int, top_k: int, is_quantized: bool, num_bytes: int = 192 << 20
) -> KernelRates:
    """Of experts in int4, or in bf16, that fill `num_bytes` if they are large. Takes less than a second."""
    is_quantized &= hidden_size % _GROUP == 0 and width % _GROUP == 0
    numbers = 3 * hidden_size * width
    each = numbers * 9 // 16 if is_quantized else 2 * numbers
    num_experts = max(2 * top_k, min(_MOST_STORED, num_bytes // each))
    shapes = (num_experts, 2 * width, hidden_size), (num_experts, hidden_size, width)
    gate_up, down = (_weight(shape, is_quantized) for shape in shapes)
    first_A = torch.arange(top_k)
    with torch.inference_mode():
        tokens = [(first_A + top_k * number)[None] % num_experts for number in range(2 + _TOKENS)]
        seconds = [_seconds(gate_up, down, experts_TA) for experts_TA in tokens]
        few = min(num_experts, max(top_k, _MOST_EXPERTS))
        num_tokens = max(1, _ROWS * few // top_k)
        many_TA = (torch.arange(num_tokens)[:, None] * top_k + first_A) % few
        prompt = min(_seconds(gate_up, down, many_TA) for _ in range(3))
    return KernelRates(_TOKENS * top_k * each / sum(seconds[2:]), 2 * num_tokens * top_k * numbers / prompt)


def _weight(shape: tuple[int, ...], is_quantized: bool) -> Tensor | Weight:
    if not is_quantized:
        return torch.full(shape, 0.01, dtype=torch.bfloat16)
    weight = empty_quantized(shape, bits=4, group_size=_GROUP, scale_dtype=torch.bfloat16, has_zeros=False)
    for tensor in weight.tensors:
        tensor.fill_(0.01 if tensor.is_floating_point() else 1)
    return weight


def _seconds(gate_up: Tensor | Weight, down: Tensor | Weight, experts_TA: Tensor) -> float:
    x_TD = torch.full((len(experts_TA), gate_up.shape[-1]), 0.5)
    routing = Routing(torch.full(experts_TA.shape, 0.1), experts_TA)
    start = time.perf_counter()
    experts_swiglu(x_TD, gate_up, down, routing=routing)
    return time.perf_counter() - start
