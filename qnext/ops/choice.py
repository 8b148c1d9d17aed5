"""Who computes a call of a public op: the first backend that serves it."""

from __future__ import annotations

from typing import Any

from qnext.ops import cpu, triton
from qnext.ops import torch as pytorch

_KERNELS = (cpu, triton)


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    """The op of the first backend with kernels whose `serves_<op>` takes these arguments; torch's where none does."""
    for backend in _KERNELS:
        serves = getattr(backend, f"serves_{op}", None)
        if serves is not None and serves(*args, **kwargs):
            return getattr(backend, op)(*args, **kwargs)
    return getattr(pytorch, op)(*args, **kwargs)
