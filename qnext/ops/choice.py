"""Who computes a call of a public op: the first backend that serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qnext.ops import cpu, triton
from qnext.ops import torch as pytorch

_KERNELS = (cpu, triton)


def kernel_for(op: str, *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """The op of the first backend with kernels whose `serves_<op>` takes these arguments; None where none does."""
    for backend in _KERNELS:
        serves = getattr(backend, f"serves_{op}", None)
        if serves is not None and serves(*args, **kwargs):
            kernel: Callable[..., Any] = getattr(backend, op)
            return kernel
    return None


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    """The op by a kernel that serves these arguments; by torch where none does."""
    kernel = kernel_for(op, *args, **kwargs)
    return getattr(pytorch, op)(*args, **kwargs) if kernel is None else kernel(*args, **kwargs)
