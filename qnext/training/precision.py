"""Whether bf16 autocast is faster on this machine. Master weights and optimiser state are fp32 in both cases."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import torch

from qnext.ops import backend_of

_SIZE, _REPEATS = 512, 5
# What a product in bf16 may take of the time of one in fp32. Where fp32 has fused kernels and bf16 has none, products
# alone must make up for all the rest of a step, which takes as long as they do.
_LESS, _MUCH_LESS = 2 / 3, 1 / 4


class PrecisionChoice(NamedTuple):
    """The choice and, where it was measured, the seconds of one 512 x 512 x 512 product in each precision."""

    precision: Literal["float32", "bfloat16"]
    float32_seconds: float | None = None
    bfloat16_seconds: float | None = None


def choose_precision(wanted: str, device: torch.device) -> PrecisionChoice:
    """`wanted`, or for "auto": bfloat16 where its matrix product takes less than two thirds of the time of fp32. Where
    fp32 has fused kernels, less than a quarter."""
    if wanted != "auto":
        assert wanted in ("float32", "bfloat16"), wanted
        return PrecisionChoice("float32" if wanted == "float32" else "bfloat16")
    float32, bfloat16 = (_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    share = _MUCH_LESS if backend_of(device).fuses_gradients else _LESS
    return PrecisionChoice("bfloat16" if bfloat16 < float32 * share else "float32", float32, bfloat16)


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    assert product.shape == matrix.shape
    return best
