"""The limits of the machine: how fast it reads memory, and how fast it multiplies numbers.

A measured speed is compared with these limits. They are measured with the threads of ops.set_num_threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from qnext.ops.backends import cpu_kernels
from qnext.ops.memory import empty_huge

ARITHMETIC = ("float32", "bfloat16", "int8")
_TORCH_DTYPES: dict[str, torch.dtype | None] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": None}
_TORCH_SIZE = 1024


def read_bandwidth(*, num_bytes: int = 1 << 30, passes: int = 5) -> float:
    """Bytes per second at which all threads together read memory in huge pages. The best of `passes`.

    Without native kernels torch sums the numbers, which may not reach the limit of the memory.
    """
    memory = empty_huge((num_bytes,), dtype=torch.uint8).fill_(1)
    native = cpu_kernels()
    if native is None:
        numbers = memory.view(torch.float32)
        return num_bytes / _best(lambda: numbers.sum(), passes)
    return num_bytes / _best(lambda: native.read_all(memory.data_ptr(), num_bytes), passes)


def peak_arithmetic(*, seconds: float = 0.1, passes: int = 5) -> dict[str, float | None]:
    """Operations per second of multiply-adds on registers, for every kind of ARITHMETIC. A multiply-add is two
    operations.

    None where the instruction set has no product of the kind. Without native kernels: the rate of torch's matrix
    products, and None for int8.
    """
    native = cpu_kernels()
    if native is None:
        return {name: _torch_peak(dtype, passes) if dtype else None for name, dtype in _TORCH_DTYPES.items()}
    return {name: _native_peak(native, kind, seconds, passes) for kind, name in enumerate(ARITHMETIC)}


def _native_peak(native: Any, kind: int, seconds: float, passes: int) -> float | None:
    rounds = 1 << 14
    operations = native.multiply(kind, rounds)
    if not operations:
        return None
    factor = max(1, int(seconds / passes / _best(lambda: native.multiply(kind, rounds), 3)))
    return operations * factor / _best(lambda: native.multiply(kind, rounds * factor), passes)


def _torch_peak(dtype: torch.dtype, passes: int) -> float:
    a = torch.ones(_TORCH_SIZE, _TORCH_SIZE, dtype=dtype)
    return 2 * _TORCH_SIZE**3 / _best(lambda: a @ a, passes)


def _best(run: Callable[[], object], passes: int) -> float:
    best = float("inf")
    for _ in range(passes):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
