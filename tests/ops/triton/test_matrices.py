"""Products with weights that stay codes, and experts, are the reference's on the numbers that the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import Fp8Weight, Norm, QuantizedWeight, Routing, SharedExpert, Weight, dequantize, reference
from qnext.ops import triton as gpu
from qnext.ops.triton import matrices

from ..compare import assert_close, randn
from .device import DEVICE, TOLERANCE, TOLERANCE_BF16, exact

KINDS = ["fp32", "bf16", "int4", "int4 with zeros", "int8", "fp8"]
CODES = KINDS[2:]


def make_weight(kind: str, *shape: int, seed: int) -> Tensor | Weight:
    """[..., F, D] on the device; D is a multiple of 8."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("fp32", "bf16"):
        return randn(*shape, seed=seed, dtype=torch.float32 if kind == "fp32" else torch.bfloat16).to(DEVICE)
    if kind == "fp8":
        scales = randn(*shape[:-2], -(-shape[-2] // 16), -(-shape[-1] // 32), seed=seed + 1, dtype=torch.float32)
        codes = randn(*shape, seed=seed, dtype=torch.float32).to(torch.float8_e4m3fn)
        return Fp8Weight(codes, scales, (16, 32)).to(DEVICE)
    bits, groups = int(kind[3]), (*shape[:-1], shape[-1] // 8)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] * bits // 8), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, groups, dtype=torch.uint8, generator=generator) if "zeros" in kind else None
    scales = randn(*groups, seed=seed + 1, dtype=torch.float32, scale=0.1 if bits == 4 else 0.01)
    return QuantizedWeight(codes, scales, bits, 8, zeros).to(DEVICE)


def wide(weight: Tensor | Weight) -> Tensor:
    return exact(dequantize(weight, torch.float32))


@pytest.mark.parametrize("num_rows", [1, 19])
@pytest.mark.parametrize("kind", CODES)
def test_linear(kind: str, num_rows: int) -> None:
    weight, x_TD = make_weight(kind, 37, 136, seed=0), randn(num_rows, 136, seed=5, dtype=torch.float32).to(DEVICE)
    assert gpu.serves_linear(x_TD, weight)
    assert_close(ops.linear(x_TD, weight).cpu(), reference.linear(exact(x_TD), wide(weight)), tolerance=TOLERANCE)


def test_linear_in_bf16() -> None:
    weight, x_TD = make_weight("int8", 33, 40, seed=0), randn(3, 40, seed=5, dtype=torch.bfloat16).to(DEVICE)
    y_TF = ops.linear(x_TD, weight)
    assert y_TF.dtype == torch.bfloat16
    assert_close(y_TF.cpu(), reference.linear(exact(x_TD), wide(weight)), tolerance=1.5 * TOLERANCE_BF16 + 2e-3)


@pytest.mark.parametrize("tile", [None, (32, 32, 64, 3)], ids=["few programs", "many programs"])
@pytest.mark.parametrize("kind", ["fp32", "int4", "fp8"])
def test_a_product_that_is_added(
    kind: str, tile: tuple[int, int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a residual that lie apart; more of them than a program takes where that is served."""
    num_rows = 3 if kind == "fp32" else 19 if tile is None else 45
    weight, x_TD = make_weight(kind, 37, 136, seed=0), randn(num_rows, 136, seed=5, dtype=torch.float32).to(DEVICE)
    residual_TF = randn(num_rows, 40, seed=6, dtype=torch.float32).to(DEVICE)[:, 2:39]
    if tile is not None:
        monkeypatch.setattr(matrices.Tile, "of", lambda *_: matrices.Tile(*tile))
    assert gpu.serves_add_linear(residual_TF, x_TD, weight)
    wanted = exact(residual_TF) + reference.linear(exact(x_TD), wide(weight))
    assert_close(ops.add_linear(residual_TF, x_TD, weight).cpu(), wanted, tolerance=TOLERANCE)


@pytest.mark.parametrize("tile", [None, (32, 32, 64, 3)], ids=["few programs", "many programs"])
@pytest.mark.parametrize("kinds", [("fp32",), ("int4", "fp32"), ("fp8", "fp8", "int8")], ids="+".join)
def test_a_norm_and_products(
    kinds: tuple[str, ...], tile: tuple[int, int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices of several forms and sizes, a row of zeros, and more columns than the first matrix has programs for."""
    weights = tuple(make_weight(kind, 7 + 21 * n, 136, seed=n) for n, kind in enumerate(kinds))
    num_rows = 3 if "fp32" in kinds else 19
    x_TD = (randn(num_rows, 136, seed=5, dtype=torch.float32) * 3.0).to(DEVICE)
    x_TD[1] = 0.0
    norm = Norm(randn(136, seed=6, dtype=torch.float32, scale=0.3).to(DEVICE), 1e-6, len(kinds) > 1)
    if tile is not None:
        monkeypatch.setattr(matrices.Tile, "of", lambda *_: matrices.Tile(*tile))
    assert gpu.serves_normed_linears(x_TD, norm, weights)
    ours = ops.normed_linears(x_TD, norm, weights)
    exact_norm = norm._replace(weight_D=exact(norm.weight_D))
    wanted = reference.normed_linears(exact(x_TD), exact_norm, tuple(map(wide, weights)))
    for actual, expected in zip((ours.rows_TD, *ours.products), (wanted.rows_TD, *wanted.products), strict=True):
        assert_close(actual.cpu(), expected, tolerance=TOLERANCE)


def test_a_norm_and_products_in_bf16() -> None:
    """The rows are rounded once before the products, as they are between a norm and a product."""
    weight, x_TD = make_weight("fp8", 33, 64, seed=0), randn(3, 64, seed=5, dtype=torch.bfloat16).to(DEVICE)
    norm = Norm(randn(64, seed=6, dtype=torch.bfloat16, scale=0.3).to(DEVICE), 1e-6, True)
    rows_TD, (y_TF,) = ops.normed_linears(x_TD, norm, (weight,))
    assert rows_TD.dtype == y_TF.dtype == torch.bfloat16
    exact_norm = norm._replace(weight_D=exact(norm.weight_D))
    wanted = reference.normed_linears(exact(x_TD), exact_norm, (wide(weight),))
    assert_close(rows_TD.cpu(), wanted.rows_TD, tolerance=TOLERANCE_BF16)
    assert_close(y_TF.cpu(), wanted.products[0], tolerance=1.5 * TOLERANCE_BF16 + 2e-3)


def make_routing(num_tokens: int, num_experts: int) -> Routing:
    scores = randn(num_tokens, num_experts, seed=9, dtype=torch.float32).to(DEVICE)
    return reference.route(scores, top_k=3, norm_topk_prob=True)


def assert_experts(kind: str, num_tokens: int, shared: SharedExpert | None = None) -> None:
    """Added to a residual, and alone where they are computed otherwise or with a shared one."""
    gate_up, down = make_weight(kind, 5, 48, 40, seed=1), make_weight(kind, 5, 40, 24, seed=3)
    x_TD, residual_TD = (randn(num_tokens, 40, seed=seed, dtype=torch.float32).to(DEVICE) for seed in (5, 6))
    routing = make_routing(num_tokens, 5)
    arguments: dict[str, Any] = {"routing": routing, "shared": shared}
    assert gpu.serves_experts_swiglu(x_TD, gate_up, down, **arguments)
    assert gpu.serves_add_experts(residual_TD, x_TD, gate_up, down, **arguments) == (num_tokens <= 8)
    parts = shared
    if shared is not None:
        gate_1D = None if shared.gate_1D is None else exact(shared.gate_1D)
        parts = SharedExpert(*map(wide, shared.weights), gate_1D)
    wanted = reference.experts_swiglu(exact(x_TD), wide(gate_up), wide(down), routing=exact(routing), shared=parts)
    if shared is not None or num_tokens > 8:
        assert_close(ops.experts_swiglu(x_TD, gate_up, down, **arguments).cpu(), wanted, tolerance=TOLERANCE)
    added_TD = ops.add_experts(residual_TD, x_TD, gate_up, down, **arguments)
    assert_close(added_TD.cpu(), exact(residual_TD) + wanted, tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_few_tokens(kind: str) -> None:
    assert_experts(kind, 2)


@pytest.mark.parametrize("kind", ["int4 with zeros", "fp8"])
def test_experts_of_many_tokens_stay_codes(kind: str) -> None:
    """Experts without a token, and with more than a tile of them."""
    assert_experts(kind, 50)


@pytest.mark.parametrize("num_tokens", [2, 9])
@pytest.mark.parametrize("has_gate", [True, False])
def test_the_shared_expert(has_gate: bool, num_tokens: int) -> None:
    """Wider than the others. Gate and up of two forms are computed apart."""
    kinds = ("fp8", "fp8", "int8") if has_gate else ("fp8", "int8", "fp8")
    shapes = ((32, 40), (32, 40), (40, 32))
    gate, up, down = (make_weight(kinds[n], *shape, seed=10 + n) for n, shape in enumerate(shapes))
    shared = SharedExpert(gate, up, down, None)
    if has_gate:
        gate_1D = make_weight("fp32", 1, 40, seed=20)
        assert isinstance(gate_1D, Tensor)
        shared = shared._replace(gate_1D=gate_1D)
    assert_experts("int4", num_tokens, shared)


def test_what_torch_multiplies_better() -> None:
    floats, codes = make_weight("fp32", 8, 16, seed=0), make_weight("int8", 8, 16, seed=0)
    assert not gpu.serves_linear(torch.ones(1, 16, device=DEVICE), floats)
    assert not gpu.serves_linear(torch.ones(65, 16, device=DEVICE), codes)
    assert not gpu.serves_linear(torch.ones(257, 16, device=DEVICE).bfloat16(), codes)
    assert gpu.serves_linear(torch.ones(256, 16, device=DEVICE).bfloat16(), codes)
    norm = Norm(torch.ones(16, device=DEVICE), 1e-6, True)
    assert not gpu.serves_normed_linears(torch.ones(17, 16, device=DEVICE), norm, (floats,))
    assert gpu.serves_normed_linears(torch.ones(17, 16, device=DEVICE), norm, (codes, floats))
    assert not gpu.serves_normed_linears(torch.ones(1, 16, device=DEVICE).half(), norm, (codes,))  # might be too large
    assert not gpu.serves_normed_linears(torch.ones(1, 16, device=DEVICE).bfloat16(), norm, (floats,))
    assert not gpu.serves_add_linear(torch.ones(1, 8, device=DEVICE).bfloat16(), torch.ones(1, 16), codes)
    gate_up, down = make_weight("fp32", 2, 16, 8, seed=1), make_weight("fp32", 2, 8, 8, seed=1)
    x_TD, experts_TA = torch.ones(9, 8, device=DEVICE), torch.zeros(9, 1, dtype=torch.int64, device=DEVICE)
    assert not gpu.serves_experts_swiglu(x_TD, gate_up, down, routing=Routing(torch.ones(9, 1), experts_TA))
