"""The gated delta rule of other packages in training: what they are given, when they serve, what if they are wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaInputs, DeltaWeights, Packing
from qnext.ops import triton as gpu
from qnext.ops.torch.delta import gated_delta_rule

from ..compare import assert_close, randn
from .device import DEVICE, here
from .packages import put_module

Place = Callable[..., list[int]]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Puts a package there that computes as the reference does; gives the numbers of tokens of its calls."""
    calls: list[int] = []

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[1, T, H, .] each, g in log space; scale and states as both packages define them."""
        assert cu_seqlens is not None and scale is not None
        assert all(len(x) == 1 and x.is_contiguous() for x in (q, k, v, g, beta))
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and {g.dtype, beta.dtype} == {torch.float32}
        calls.append(q.shape[1])
        packing = Packing(cu_seqlens.diff().tolist(), device=q.device)
        inputs = DeltaInputs(q[0] * (scale * q.shape[-1] ** 0.5), k[0], v[0], sign * g[0], beta[0])
        o, state = gated_delta_rule(inputs, packing=packing, initial_state_NHKV=initial_state)
        return o[None], state if output_final_state else None

    sign = 1.0

    def put(name: str, *, is_right: bool) -> list[int]:
        nonlocal sign
        sign = 1.0 if is_right else 0.5
        put_module(monkeypatch, name, chunk_gated_delta_rule=chunk_gated_delta_rule)
        return calls

    gpu.training_rule.cache_clear()
    yield put
    gpu.training_rule.cache_clear()


def mixed(dtype: torch.dtype) -> list[Tensor]:
    """The mixer of two sequences: its output and gradients of both projections."""
    shapes = ((72, 1, 3), (2,), (2,), (20,))
    tensors = here([randn(*shape, seed=n, dtype=torch.float32, scale=0.5) for n, shape in enumerate(shapes)])
    weights = DeltaWeights(*tensors, eps=1e-6, num_key_heads=1, key_head_dim=16)
    rows = [here(randn(5, width, seed=width, dtype=dtype)).requires_grad_() for width in (112, 4)]
    out_TZ = ops.gated_delta_mixer(*rows, weights, packing=Packing([2, 3], device=DEVICE))
    out_TZ.backward(here(randn(*out_TZ.shape, seed=9, dtype=dtype)))
    return [out_TZ.detach().cpu(), *(x.grad.cpu() for x in rows if x.grad is not None)]


def test_a_package_that_is_right_serves_rows_in_bf16(place: Place) -> None:
    own = mixed(torch.bfloat16)
    gpu.training_rule.cache_clear()
    calls = place("flash_qla", is_right=True)
    rule = gpu.training_rule(DEVICE)
    assert rule is not None and rule.package == "flash-qla"
    calls.clear()
    for ours, theirs in zip(mixed(torch.bfloat16), own, strict=True):
        assert_close(ours, theirs, tolerance=3e-2)  # q, k and v are rounded to bf16 between the kernels
    assert calls == [5, 5]  # forward, and once more for the gradient
    mixed(torch.float32)
    assert len(calls) == 2


def test_a_package_that_is_wrong_is_named_once_and_not_used(place: Place) -> None:
    calls = place("flash_qla", is_right=False)
    with pytest.warns(
        RuntimeWarning, match="rule of flash-qla is off by .* from the reference; another serves"
    ) as seen:
        assert gpu.training_rule(DEVICE) is None and gpu.training_rule(DEVICE) is None
    assert len(seen) == len(calls) == 1


def test_a_package_that_breaks_is_named_and_the_next_one_asked(place: Place) -> None:
    place("fla.ops.gated_delta_rule", is_right=True)
    place("flash_qla", is_right=True)
    del sys.modules["flash_qla"].chunk_gated_delta_rule  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match="flash-qla cannot be imported .AttributeError"):
        rule = gpu.training_rule(DEVICE)
    assert rule is not None and rule.package == "flash-linear-attention"


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("package, module", [("flash-qla", "flash_qla"), ("flash-linear-attention", "fla")])
def test_an_installed_package_is_right(package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(module)
    monkeypatch.setenv("QNEXT_PACKAGES", package)
    gpu.training_rule.cache_clear()
    assert gpu.training_rule(DEVICE) is not None
    gpu.training_rule.cache_clear()


def test_a_package_that_may_not_serve_is_not_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = place("flash_qla", is_right=True)
    place("fla.ops.gated_delta_rule", is_right=True)
    monkeypatch.setenv("QNEXT_PACKAGES", "none")
    assert gpu.training_rule(DEVICE) is None and not calls
    gpu.training_rule.cache_clear()
    monkeypatch.setenv("QNEXT_PACKAGES", "flashinfer, flash-linear-attention")
    rule = gpu.training_rule(DEVICE)
    assert rule is not None and rule.package == "flash-linear-attention"
