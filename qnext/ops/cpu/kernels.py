"""The compiled module, and the checks for all its calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qnext.ops import backends


def kernels() -> Any:
    """The compiled module, for a caller that knows that it exists."""
    module = backends.cpu_kernels()
    assert module is not None, "ask whether the kernels serve first"
    return module


def run_on(device: torch.device) -> bool:
    """Whether kernels run for tensors on `device`."""
    return device.type == "cpu" and backends.cpu_kernels() is not None


def take(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels may take a call: fp32 activations `x` on the CPU, and no gradients wanted."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or backends.cpu_kernels() is None:
        return False
    return not wants_gradients(x, *others)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors becomes part of a graph."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_fp32(tensor: Tensor) -> bool:
    """Whether kernels with a gradient can read the tensor."""
    return tensor.dtype == torch.float32 and tensor.is_cpu


def check_memory(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    """Raises ValueError where the memory of `x` is not what a kernel reads or writes at its address."""
    if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
        raise ValueError(f"expected {dtype}, contiguous, on the CPU, not {x.dtype} on {x.device}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"expected numbers of shape {list(shape)}, not {list(x.shape)}")


def widened(parameter: Tensor) -> Tensor:
    """A small parameter in fp32. It is converted once and kept beside the parameter until that changes."""
    if parameter.dtype == torch.float32:
        return parameter
    if parameter.is_inference():  # it has no version to tell a change by
        return parameter.float()
    kept: tuple[int, int, Tensor] | None = getattr(parameter, "_wide", None)
    stamp = (parameter._version, parameter.data_ptr())
    if kept is None or kept[:2] != stamp:
        kept = (*stamp, parameter.detach().float())
        parameter._wide = kept  # type: ignore[attr-defined]
    return kept[2]
