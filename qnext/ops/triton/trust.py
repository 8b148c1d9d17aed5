"""Which GPU kernels run: those that a device can run, and that gave the reference's numbers on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from qnext.ops import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations
_TOLERANCE = 1e-4  # relative RMS of fp32 numbers; a GPU's exponentials are known to 2e-7, and products use TF32 thrice

# From a device to pairs of numbers: the kernel's, and the reference's in fp32.
SelfTest = Callable[[torch.device], Iterable[tuple[Tensor, Tensor]]]


def run_on(device: torch.device) -> bool:
    """Whether kernels run for tensors on `device`."""
    return backends.triton_serves(device.type)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors becomes part of a graph."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def take(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels may take a call: activations `x` of at most fp32 on a device that runs them, no gradients."""
    return x.dtype in DTYPES and run_on(x.device) and not wants_gradients(x, *others)


@cache
def is_trusted(self_test: SelfTest, device: torch.device) -> bool:
    """Whether the kernel that `self_test` runs gives the reference's numbers on `device`. Asked once.

    A kernel that does not, or that does not compile, is named in one warning, and torch computes in its place.
    """
    name = self_test.__name__.removeprefix("try_")
    try:
        error = self_test_error(self_test, device)
        reason = "" if error <= _TOLERANCE else f"is off by {error:.1e} from the reference"
    except Exception as failure:  # whatever a compiler or a driver may raise
        reason = f"does not run ({type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''})"
    if reason:
        warnings.warn(f"the GPU kernel {name} {reason}; PyTorch computes instead", RuntimeWarning, stacklevel=2)
    return not reason


def self_test_error(self_test: SelfTest, device: torch.device) -> float:
    """The largest relative RMS error among the results of a self-test; NaN where one has NaN."""
    with torch.no_grad():
        errors = [_relative_rms(actual, wanted) for actual, wanted in self_test(device)]
    return max(errors, key=lambda error: (error != error, error))


def num_processors(device: torch.device) -> int:
    """How many programs a device runs side by side, at least."""
    if device.type != "cuda":
        return 4  # of the interpreter, which runs one after the other: work is shared out as on a small GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def numbers(*shape: int, seed: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal numbers in fp32, the same on every device."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def _relative_rms(actual: Tensor, wanted: Tensor) -> float:
    actual, wanted = actual.double(), wanted.double()
    scale = wanted.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return float((actual - wanted).square().mean().sqrt() / scale)
