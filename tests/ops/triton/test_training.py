"""Gradients of GPU kernels are those of the reference in fp64: every op that training calls, and a whole step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.model import CausalLM
from qnext.ops import (
    AttentionWeights,
    DeltaInputs,
    DeltaWeights,
    Packing,
    Rope,
    Routing,
    SharedExpert,
    reference,
)
from qnext.ops import triton as gpu
from qnext.ops.records import DeltaOutput
from qnext.training import Hooks, StepMetrics
from tests.training.models import tiny_model
from tests.training.test_loop import CONFIG, make_trainer

from ..compare import Function, assert_close, randn
from .device import DEVICE, TOLERANCE, TOLERANCE_BF16, here


def assert_gradients(op: Function, definition: Function, inputs: list[Tensor], *, tolerance: float) -> None:
    """Results and gradients of every input, from equal weights of the results; the definition is computed in fp64."""
    ours = [here(x.clone()).requires_grad_() for x in inputs]
    exact = [x.to(torch.float64).requires_grad_() for x in inputs]
    results, wanted = op(*ours), definition(*exact)
    weights = [randn(*y.shape, seed=100 + n) for n, y in enumerate(wanted)]
    torch.autograd.backward(results, [here(w.to(y.dtype)) for w, y in zip(weights, results, strict=True)])
    torch.autograd.backward(wanted, weights)
    for n, (y, other) in enumerate(zip(results, wanted, strict=True)):
        assert_close(y.detach().cpu(), other.detach(), tolerance=tolerance, name=f"result {n}")
    for n, (x, other) in enumerate(zip(ours, exact, strict=True)):
        assert x.grad is not None and other.grad is not None and x.grad.dtype == x.dtype
        assert_close(x.grad.cpu(), other.grad, tolerance=tolerance, name=f"gradient {n}")


@pytest.mark.parametrize("shape", [(1, 5), (70, 24), (2, 13, 40)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    """Rows of fewer and of more than one program, and rows of zeros."""
    for dtype, zero_centered in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        x, weight_D = randn(*shape, seed=0, dtype=dtype), randn(shape[-1], seed=1, dtype=torch.float32)
        x.view(-1, shape[-1])[1:2] = 0.0
        how = {"eps": 1e-6, "zero_centered": zero_centered}
        assert gpu.serves_rms_norm(here(x.clone()).requires_grad_(), here(weight_D), **how)
        assert_gradients(
            lambda x, w, how=how: (ops.rms_norm(x, w, **how),),
            lambda x, w, how=how: (reference.rms_norm(x, w, **how),),
            [x, weight_D],
            tolerance=TOLERANCE if dtype == torch.float32 else TOLERANCE_BF16,
        )


def test_a_gradient_of_a_norm_has_the_same_bits_in_every_run() -> None:
    x, weight_D = randn(200, 40, seed=0, dtype=torch.float32), randn(40, seed=1, dtype=torch.float32)
    found = []
    for _ in range(2):
        weight = here(weight_D.clone()).requires_grad_()
        ops.rms_norm(here(x), weight, eps=1e-6, zero_centered=True).square().sum().backward()
        found.append(weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("lengths", [[1, 63], [64, 65], [130]], ids=str)
def test_gated_delta_rule(lengths: list[int]) -> None:
    """From states, of sizes that fill no block; one token forgets everything."""
    packing, key_dim, value_dim = Packing(lengths, device=DEVICE), 12, 20
    num_tokens, key_heads, heads = packing.num_tokens, 1, 1
    log_decays_TH = -randn(num_tokens, heads, seed=3, dtype=torch.float32).abs()
    log_decays_TH[num_tokens // 2, 0] = -200.0
    inputs = [
        ops.l2_norm(randn(num_tokens, key_heads, key_dim, seed=0, dtype=torch.float32)),
        ops.l2_norm(randn(num_tokens, key_heads, key_dim, seed=1, dtype=torch.float32)),
        randn(num_tokens, heads, value_dim, seed=2, dtype=torch.float32),
        log_decays_TH,
        randn(num_tokens, heads, seed=4, dtype=torch.float32).sigmoid(),
        randn(len(lengths), heads, key_dim, value_dim, seed=5, dtype=torch.float32),
    ]
    tensors = DeltaInputs(*(here(x.clone()).requires_grad_() for x in inputs[:5]))
    assert gpu.serves_gated_delta_rule(tensors, packing=packing, initial_state_NHKV=here(inputs[5]))

    def rule(op: Callable[..., DeltaOutput]) -> Function:
        return lambda *x: tuple(op(DeltaInputs(*x[:5]), packing=packing, initial_state_NHKV=x[5]))

    assert_gradients(rule(ops.gated_delta_rule), rule(reference.gated_delta_rule), inputs, tolerance=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_delta_mixer(dtype: torch.dtype) -> None:
    """Two value heads of a key head, sizes that fill no block, sequences shorter than the convolution."""
    lengths = [2, 17, 1] if dtype == torch.float32 else [4, 1]
    packing, key_heads, repeats, key_dim, value_dim, width = Packing(lengths, device=DEVICE), 2, 2, 12, 20, 3
    num_tokens, heads = packing.num_tokens, key_heads * repeats
    channels = 2 * key_heads * key_dim + heads * value_dim
    inputs = [
        randn(num_tokens, channels + heads * value_dim, seed=0, dtype=dtype),
        randn(num_tokens, 2 * heads, seed=1, dtype=dtype),
        randn(channels, 1, width, seed=2, dtype=torch.float32, scale=0.5),
        *(randn(heads, seed=seed, dtype=torch.float32, scale=0.5) for seed in (3, 4)),
        randn(value_dim, seed=5, dtype=torch.float32),
    ]

    def mixer(op: Callable[..., Tensor]) -> Function:
        def call(qkvz_TX: Tensor, ba_TY: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            weights = DeltaWeights(*tensors, eps=1e-6, num_key_heads=key_heads, key_head_dim=key_dim)
            if qkvz_TX.dtype == dtype:
                assert gpu.serves_gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing)
            return (op(qkvz_TX, ba_TY, weights, packing=packing),)

        return call

    inputs[0][num_tokens // 2, :key_dim] = 0.0
    tolerance = TOLERANCE if dtype == torch.float32 else TOLERANCE_BF16
    assert_gradients(mixer(ops.gated_delta_mixer), mixer(reference.gated_delta_mixer), inputs, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_gate", [True, False])
def test_attention_mixer(has_gate: bool, dtype: torch.dtype) -> None:
    """Three query heads of a key head, of which a part is rotated; sequences of one token and of more."""
    packing, heads, kv_heads, dim, half = Packing([1, 20], device=DEVICE), 6, 2, 20, 3
    rope = Rope(*(randn(packing.num_tokens, half, seed=seed, dtype=torch.float32) for seed in (6, 7)))
    inputs = [
        randn(packing.num_tokens, heads * dim * (2 if has_gate else 1), seed=0, dtype=dtype),
        *(randn(packing.num_tokens, kv_heads * dim, seed=seed, dtype=dtype) for seed in (1, 2)),
        *(randn(dim, seed=seed, dtype=torch.float32, scale=0.3) for seed in (3, 4)),
    ]

    def mixer(op: Callable[..., Tensor]) -> Function:
        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            weights = AttentionWeights(*tensors[3:], 1e-6, True, has_gate, 0.3)
            if tensors[0].dtype == dtype:
                assert gpu.serves_attention_mixer(*tensors[:3], weights, rope=here(rope), packing=packing)
            return (op(*tensors[:3], weights, rope=rope._make(x.to(tensors[0].device) for x in rope), packing=packing),)

        return call

    # attention itself is PyTorch's, whose rounding of bf16 enters sums
    tolerance = TOLERANCE if dtype == torch.float32 else 3e-2
    assert_gradients(mixer(ops.attention_mixer), mixer(reference.attention_mixer), inputs, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    """Of halves of rows, and of a width that fills no block."""
    inputs = [randn(5, 90, seed=0, dtype=dtype)]
    tolerance = TOLERANCE if dtype == torch.float32 else TOLERANCE_BF16

    def halves(op: Callable[..., Tensor]) -> Function:
        return lambda x: (op(*x.chunk(2, dim=-1)),)

    assert gpu.serves_swiglu(*here(inputs[0].clone()).requires_grad_().chunk(2, dim=-1))
    assert_gradients(halves(ops.swiglu), halves(reference.swiglu), inputs, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype: torch.dtype) -> None:
    """With the shared expert; one routed expert has no token."""
    num_tokens, experts, hidden, width, top_k = 7, 5, 40, 24, 3
    experts_TA = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(num_tokens)])
    inputs = [
        randn(num_tokens, hidden, seed=0, dtype=dtype),
        randn(experts, 2 * width, hidden, seed=1, dtype=torch.float32, scale=0.3),
        randn(experts, hidden, width, seed=2, dtype=torch.float32, scale=0.3),
        randn(num_tokens, top_k, seed=3, dtype=torch.float32).sigmoid(),
        *(randn(*shape, seed=4, dtype=dtype, scale=0.2) for shape in ((16, hidden), (16, hidden), (hidden, 16))),
        randn(1, hidden, seed=5, dtype=dtype),
    ]

    def moe(op: Callable[..., Tensor]) -> Function:
        def call(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
            routing = Routing(weights, experts_TA.to(x.device))
            if x.dtype == dtype:
                assert gpu.serves_experts_swiglu(x, gate_up, down, routing=routing)
            return (op(x, gate_up, down, routing=routing, shared=SharedExpert(*shared)),)

        return call

    # PyTorch's products round bf16 between the kernels
    tolerance = TOLERANCE if dtype == torch.float32 else 3e-2
    assert_gradients(moe(ops.experts_swiglu), moe(reference.experts_swiglu), inputs, tolerance=tolerance)


def test_a_step_of_training_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss, gradient norm and parameters afterwards; kernels take every op that has one."""
    taken: Counter[str] = Counter()
    names = ("rms_norm", "gated_delta_mixer", "attention_mixer", "experts_swiglu")

    def step(*, on_kernels: bool) -> tuple[StepMetrics, CausalLM]:
        seen: list[StepMetrics] = []
        model = tiny_model()
        with monkeypatch.context() as patch:
            for name in names:
                serves = getattr(gpu, f"serves_{name}")

                def counted(*args: Any, name: str = name, serves: Any = serves, **kwargs: Any) -> bool:
                    taken[name] += on_kernels and serves(*args, **kwargs)
                    return on_kernels and serves(*args, **kwargs)

                patch.setattr(gpu, f"serves_{name}", counted)
            config = CONFIG.with_(accumulation=1, total_steps=1, tokens_per_batch=8, sequence_length=8)
            make_trainer(config, model=model, hooks=Hooks(on_step=seen.append)).run()
        return seen[0], model

    (ours, model), (theirs, other) = step(on_kernels=True), step(on_kernels=False)
    assert set(taken) == set(names) and all(taken.values())
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for mine, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(mine.detach(), wanted.detach(), tolerance=1e-4)
