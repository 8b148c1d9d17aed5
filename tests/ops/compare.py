"""How ops are compared: relative RMS, forward and gradient, against plain definitions in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# relative RMS: a few roundings of the dtype, some dozens for sums over a sequence
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}
LENGTHS = [1, 2, 63, 64, 65, 130, 1000]
RAGGED = [1, 64, 3, 65, 2, 130]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`; NaN anywhere gives NaN, which is below no tolerance."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt()
    return (difference / scale).item() if scale > 0 else difference.item()


def assert_close(actual: Tensor, expected: Tensor, *, tolerance: float, name: str = "result") -> None:
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{name}: relative RMS {error:.2e} above {tolerance:.0e}"


Function = Callable[..., tuple[Tensor, ...]]


def assert_same_function(
    op: Function, definition: Function, inputs: dict[str, Tensor], *, tolerance: float, gradient_tolerance: float = 0.0
) -> None:
    """The op in the dtypes of `inputs`, the definition in fp64; results and gradients for every floating input."""
    ours = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    outputs, expected = op(**ours), definition(**exact)
    for i, (actual, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(actual.detach(), wanted.detach(), tolerance=tolerance, name=f"output {i}")
    cotangents = [randn(*wanted.shape, seed=100 + i) for i, wanted in enumerate(expected)]
    torch.autograd.backward(outputs, [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)])
    torch.autograd.backward(expected, cotangents)
    for name, x in ours.items():
        assert x.grad is not None, name
        assert x.grad.dtype == x.dtype
        wanted = exact[name].grad
        assert wanted is not None
        assert_close(x.grad, wanted, tolerance=gradient_tolerance or tolerance, name=f"gradient of {name}")
