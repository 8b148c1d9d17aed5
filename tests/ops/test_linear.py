"""bf16 inference on the CPU takes paths of its own; all must agree with the product in float64."""

from __future__ import annotations

import pytest
import torch

from qnext import ops
from qnext.ops.torch import matrices, moe


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(
        (actual.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt()
    )


@pytest.fixture(params=[False, True], ids=["widened", "native"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(matrices, "has_native_bf16", lambda: request.param)
    monkeypatch.setattr(moe, "has_native_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 65])
@pytest.mark.parametrize("outputs", [3, 1024, 1100])
def test_linear_in_bf16(native: bool, rows: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 40, generator=generator).bfloat16()
    weight = torch.randn(outputs, 40, generator=generator).bfloat16()
    out = ops.linear(x, weight)
    assert out.dtype == torch.bfloat16 and out.shape == (rows, outputs)
    # One rounding of the result to 8 bits: at most 2^-9 relative, plus what torch's own product may round inside.
    assert relative_rms(out, x.double() @ weight.double().t()) < 4e-3


def test_linear_keeps_gradients_and_bias() -> None:
    x = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.linear, (x, weight, bias))
    wide = torch.randn(20, 8).bfloat16().requires_grad_()
    ops.linear(wide, torch.randn(5, 8).bfloat16()).sum().backward()
    assert wide.grad is not None


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_experts_in_bf16(native: bool, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, 16), (9, 24, 16), (9, 16, 12), (num_tokens, 9))
    x, gate_up, down, logits = (torch.randn(*shape, generator=generator) for shape in shapes)
    routing = ops.route(logits, top_k=3, norm_topk_prob=True)
    x, gate_up, down = (0.3 * t for t in (x, gate_up, down))
    out = ops.experts_swiglu(x.bfloat16(), gate_up.bfloat16(), down.bfloat16(), routing=routing)
    wide = (t.bfloat16().double() for t in (x, gate_up, down))
    expected = ops.experts_swiglu(*wide, routing=ops.Routing(routing.weights_TA.double(), routing.experts_TA))
    assert out.dtype == torch.bfloat16
    # Hidden values are rounded to bf16 on some paths, so two roundings of 2^-9 each and their sum over experts.
    assert relative_rms(out, expected) < 1e-2
