"""Which GPU kernels run: those that a device can run, and that gave the reference's numbers on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

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


def train(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels with gradients may take a call: `x` and parameters of at most fp32 on a device that runs them."""
    tensors = [t for t in (x, *others) if t is not None]
    return run_on(x.device) and all(t.dtype in DTYPES and t.device == x.device for t in tensors)


@cache
def is_trusted(self_test: SelfTest, device: torch.device) -> bool:
    """Whether the kernel that `self_test` runs gives the reference's numbers on `device`. Asked once.

    A kernel that does not, or that does not compile, is named in one warning, and torch computes in its place.
    """
    name, reason = self_test.__name__.removeprefix("try_"), reason_against(self_test, device, _TOLERANCE)
    if reason:
        warnings.warn(f"the GPU kernel {name} {reason}; PyTorch computes instead", RuntimeWarning, stacklevel=2)
    return not reason


def reason_against(self_test: SelfTest, device: torch.device, tolerance: float) -> str:
    """Why what `self_test` runs is not to be trusted on `device`; empty where it is."""
    try:
        error = self_test_error(self_test, device)
    except Exception as failure:  # whatever a compiler or a driver may raise
        return f"does not run ({type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''})"
    return "" if error <= tolerance else f"is off by {error:.1e} from the reference"


def self_test_error(self_test: SelfTest, device: torch.device) -> float:
    """The largest relative RMS error among the results of a self-test; NaN where one has NaN."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        errors = [_relative_rms(actual, wanted) for actual, wanted in self_test(device)]
    return max(errors, key=lambda error: (error != error, error))


def compared(
    kernel: Callable[..., Any], definition: Callable[..., Any], *inputs: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Results of a kernel and of its definition, and the gradients of all inputs under equal weights of the results."""
    found = []
    for function in (kernel, definition):
        ours = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            results = function(*ours)
            results = results if isinstance(results, tuple) else (results,)
            weights = [numbers(*y.shape, seed=90 + n, device=y.device) for n, y in enumerate(results)]
            grads = torch.autograd.grad(results, ours, weights)
        found.append([*(y.detach() for y in results), *grads])
    return zip(*found, strict=True)


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
