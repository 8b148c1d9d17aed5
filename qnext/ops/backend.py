"""Which implementation of an op runs: native kernels or the reference."""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKEND_VARIABLE = "QNEXT_BACKEND"


@cache
def native_module() -> ModuleType | None:
    """The compiled kernels, or None where they were not built or QNEXT_BACKEND=reference forbids them.

    Their absence is said once, in a warning. Raises ValueError for an unknown value of the variable, and ImportError
    where QNEXT_BACKEND=cpu demands kernels that are not there.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    if wanted not in ("", "cpu", "reference"):
        raise ValueError(f"{BACKEND_VARIABLE} must be 'cpu' or 'reference', not {wanted!r}")
    if wanted == "reference":
        return None
    try:
        module = importlib.import_module("qnext.ops.cpu._native")
    except ImportError as error:
        if wanted == "cpu":
            raise
        warnings.warn(
            f"native CPU kernels are not available ({error}); the slower reference serves", RuntimeWarning, stacklevel=2
        )
        return None
    module.set_num_threads(torch.get_num_threads())
    return module


def native() -> Any:
    """The compiled kernels, for a caller who knows that they are there."""
    module = native_module()
    assert module is not None, "ask runs_native first"
    return module


def set_num_threads(count: int) -> None:
    """Threads of torch and of the native kernels."""
    torch.set_num_threads(count)
    module = native_module()
    if module is not None:
        module.set_num_threads(count)


def is_native(device: torch.device) -> bool:
    """Whether inference on `device` runs the native kernels."""
    return device.type == "cpu" and native_module() is not None


def runs_native(x: Tensor, *others: Tensor | None) -> bool:
    """Whether native kernels take this call: fp32 activations `x` on the CPU, and nobody wants gradients."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or native_module() is None:
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))


def wide(parameter: Tensor) -> Tensor:
    """A small parameter in fp32, converted once: kept beside it until it changes."""
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
