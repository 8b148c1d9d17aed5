"""Whether bf16 autocast is faster on this machine. Master weights and optimiser state are fp32 in both cases."""

from __future__ import annotations

import time
from typing import Literal, NamedTuple

import torch

from qnext.ops import backend_of

_SIZE, _REPEATS, _ROUNDS = 512, 5, 3
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
    fp32 has fused kernels, less than a quarter.

    It is measured three times, and bfloat16 has to win each time. Near the border the choice is fp32.
    """
    if wanted != "auto":
        assert wanted in ("float32", "bfloat16"), wanted
        return PrecisionChoice("float32" if wanted == "float32" else "bfloat16")
    share = _MUCH_LESS if backend_of(device).fuses_gradients else _LESS
    # The round in which bf16 does worst.
    float32, bfloat16 = max((_seconds(device) for _ in range(_ROUNDS)), key=lambda seconds: seconds[1] / seconds[0])
    return PrecisionChoice("bfloat16" if bfloat16 < float32 * share else "float32", float32, bfloat16)


def _seconds(device: torch.device) -> tuple[float, float]:
    """Of the fastest product in fp32, and in bf16; both in turn. On a CPU the time that this thread computed counts:
    the wall clock also counts the programs that the thread has waited for."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    matrices = {dtype: torch.ones(_SIZE, _SIZE, dtype=dtype, device=device) for dtype in best}
    for _ in range(_REPEATS):
        for dtype, matrix in matrices.items():
            start = clock()
            torch.mm(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[dtype] = min(best[dtype], clock() - start)
    return best[torch.float32], best[torch.bfloat16]
