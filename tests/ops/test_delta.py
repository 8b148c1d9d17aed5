"""The gated delta rule: the chunked form, the recurrent form and the formula are one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaInputs, Packing
from qnext.ops.reference.delta import gated_delta_rule as formula
from qnext.ops.torch.delta import chunk_gated_delta_rule, recurrent_gated_delta_rule

from .compare import LENGTHS, RAGGED, TOLERANCES, assert_close, assert_same_function, randn

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 8, 12


def make_inputs(
    lengths: list[int], *, dtype: torch.dtype = torch.float64, with_state: bool = True
) -> dict[str, Tensor]:
    num_tokens = sum(lengths)
    inputs = {
        "q": ops.l2_norm(randn(num_tokens, KEY_HEADS, KEY_DIM, seed=0)).to(dtype),
        "k": ops.l2_norm(randn(num_tokens, KEY_HEADS, KEY_DIM, seed=1)).to(dtype),
        "v": randn(num_tokens, VALUE_HEADS, VALUE_DIM, seed=2, dtype=dtype),
        "g": -torch.nn.functional.softplus(randn(num_tokens, VALUE_HEADS, seed=3, scale=2.0)).to(dtype),
        "beta": torch.sigmoid(randn(num_tokens, VALUE_HEADS, seed=4)).to(dtype),
    }
    if with_state:
        inputs["state"] = randn(len(lengths), VALUE_HEADS, KEY_DIM, VALUE_DIM, seed=5, dtype=dtype)
    return inputs


def definition(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, *, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    inputs = DeltaInputs(q, k, v, g, beta)
    return tuple(formula(inputs, packing=Packing(lengths), initial_state_NHKV=state))  # type: ignore[return-value]


FORMS = {
    "chunk": chunk_gated_delta_rule,
    "recurrent": recurrent_gated_delta_rule,
    "chosen": ops.gated_delta_rule,
}


def run(
    form: str,
    lengths: list[int],
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    inputs = DeltaInputs(q, k, v, g, beta)
    return tuple(FORMS[form](inputs, packing=Packing(lengths), initial_state_NHKV=state, **options))  # type: ignore[return-value]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("lengths", [[1], [2], [1, 1, 1], [5, 1, 70], [66]])
@pytest.mark.parametrize("with_state", [False, True])
def test_every_form_is_the_definition(form: str, lengths: list[int], with_state: bool) -> None:
    assert_same_function(
        lambda **x: run(form, lengths, **x),
        lambda **x: definition(**x, lengths=lengths),
        make_inputs(lengths, with_state=with_state),
        tolerance=1e-12,
    )


# One step is as the other: the recurrent form shows nothing at a thousand that it has not shown at 130.
LONG = pytest.param(1000, "recurrent", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("length", "form"),
    [*((length, "chunk") for length in LENGTHS), *((length, "recurrent") for length in LENGTHS[:-1]), LONG],
)
def test_every_length_is_the_definition(length: int, form: str) -> None:
    """Forward, carried state and every gradient, in fp64."""
    assert_same_function(
        lambda **x: run(form, [length], **x),
        lambda **x: definition(**x, lengths=[length]),
        make_inputs([length]),
        tolerance=1e-12,
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 64, 128])
def test_the_chunk_size_does_not_matter(chunk_size: int) -> None:
    assert_same_function(
        lambda **x: run("chunk", RAGGED, chunk_size=chunk_size, **x),
        lambda **x: run("recurrent", RAGGED, **x),
        make_inputs(RAGGED),
        tolerance=1e-12,
    )


@pytest.mark.parametrize("form", list(FORMS))
def test_packed_is_separate(form: str) -> None:
    inputs = make_inputs(RAGGED)
    o, state = run(form, RAGGED, **inputs)
    pieces = {name: inputs[name].split(RAGGED) for name in ("q", "k", "v", "g", "beta")}
    for n, length in enumerate(RAGGED):
        alone = {name: parts[n] for name, parts in pieces.items()}
        expected_o, expected_state = run(form, [length], state=inputs["state"][n : n + 1], **alone)
        assert_close(o.split(RAGGED)[n], expected_o, tolerance=1e-13)
        assert_close(state[n : n + 1], expected_state, tolerance=1e-13)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 129])
def test_two_pieces_are_the_whole(form: str, cut: int) -> None:
    inputs = make_inputs([130])
    state = inputs.pop("state")
    whole_o, whole_state = run(form, [130], state=state, **inputs)
    first_o, middle = run(form, [cut], state=state, **{name: x[:cut] for name, x in inputs.items()})
    second_o, last = run(form, [130 - cut], state=middle, **{name: x[cut:] for name, x in inputs.items()})
    assert_close(torch.cat([first_o, second_o]), whole_o, tolerance=1e-12)
    assert_close(last, whole_state, tolerance=1e-12)


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gradients_by_finite_differences(form: str) -> None:
    lengths = [3, 1]
    inputs = make_inputs(lengths)
    for name, heads, dims in (("q", 1, [3]), ("k", 1, [3]), ("v", 2, [2]), ("g", 2, []), ("beta", 2, [])):
        inputs[name] = inputs[name][:, :heads][(..., *(slice(d) for d in dims))].contiguous()
    inputs["state"] = inputs["state"][:, :2, :3, :2].contiguous()
    names = list(inputs)
    options = {"chunk_size": 2} if form == "chunk" else {}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return run(form, lengths, **dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(FORMS))
def test_narrow_inputs(form: str, dtype: torch.dtype) -> None:
    """Rounded inputs, wide arithmetic: the error is that of the rounded output, and the state stays fp32."""
    lengths = [1, 70, 130]
    inputs = make_inputs(lengths, dtype=dtype)
    inputs["state"] = inputs["state"].float()
    o, state = run(form, lengths, **inputs)
    assert (o.dtype, state.dtype) == (dtype, torch.float32)
    expected_o, expected_state = run("recurrent", lengths, **{name: x.double() for name, x in inputs.items()})
    assert_close(o, expected_o, tolerance=TOLERANCES[dtype] / 2)
    assert_close(state, expected_state, tolerance=TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_gradients(dtype: torch.dtype) -> None:
    lengths = [70, 130]
    inputs = make_inputs(lengths, dtype=dtype, with_state=False)
    for name in ("g", "beta"):
        inputs[name] = inputs[name].float()  # as the model has them
    assert_same_function(
        lambda **x: run("chunk", lengths, **x),
        lambda **x: run("recurrent", lengths, **x),
        inputs,
        tolerance=TOLERANCES[dtype],
    )


def everything_finite(form: str, lengths: list[int], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, state = run(form, lengths, **leaves)
    (o.square().sum() + state.square().sum()).backward()
    assert o.isfinite().all()
    assert state.isfinite().all()
    for name, x in leaves.items():
        assert x.grad is not None
        assert x.grad.isfinite().all(), name
    return o.detach(), state.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [-1e4, -100.0, -88.0, 0.0])
def test_extreme_decay(dtype: torch.dtype, decay: float) -> None:
    """A decay that forgets everything, or nothing: no overflow, no 0 * inf, forward and backward."""
    inputs = make_inputs(RAGGED, dtype=dtype)
    inputs["g"] = torch.full_like(inputs["g"], decay)
    o, state = everything_finite("chunk", RAGGED, inputs)
    expected_o, expected_state = run("recurrent", RAGGED, **{name: x.double() for name, x in inputs.items()})
    assert_close(o, expected_o, tolerance=TOLERANCES[dtype])
    assert_close(state, expected_state, tolerance=TOLERANCES[dtype])


def test_a_single_extreme_decay_among_mild_ones() -> None:
    """Differences of a running sum near 1e4 keep 1e-3 of absolute precision in fp32, and so do the decays."""
    inputs = make_inputs([130], dtype=torch.float32)
    inputs["g"] = inputs["g"] * 0.01
    inputs["g"][40] = -1e4
    o, state = everything_finite("chunk", [130], inputs)
    expected_o, expected_state = run("recurrent", [130], **{name: x.double() for name, x in inputs.items()})
    assert_close(o, expected_o, tolerance=2e-3)
    assert_close(state, expected_state, tolerance=2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extreme_writes(dtype: torch.dtype, beta: float) -> None:
    inputs = make_inputs(RAGGED, dtype=dtype)
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    o, state = everything_finite("chunk", RAGGED, inputs)
    expected_o, expected_state = run("recurrent", RAGGED, **{name: x.double() for name, x in inputs.items()})
    assert_close(o, expected_o, tolerance=TOLERANCES[dtype])
    assert_close(state, expected_state, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identical_keys_without_decay(dtype: torch.dtype) -> None:
    """The hardest system: all entries under the diagonal are one, and each token replaces what the last one wrote."""
    inputs = make_inputs([200], dtype=dtype)
    inputs["k"] = inputs["k"][:1].expand_as(inputs["k"]).contiguous()
    inputs["beta"] = torch.ones_like(inputs["beta"])
    inputs["g"] = torch.zeros_like(inputs["g"])
    o, state = everything_finite("chunk", [200], inputs)
    expected_o, expected_state = run("recurrent", [200], **{name: x.double() for name, x in inputs.items()})
    assert_close(o, expected_o, tolerance=10 * TOLERANCES[dtype])
    assert_close(state, expected_state, tolerance=10 * TOLERANCES[dtype])


def test_a_neutral_token_leaves_the_state_as_it_is() -> None:
    """g = 0 and beta = 0: what padding on the right would have to be."""
    inputs = make_inputs([5])
    neutral = {name: x.clone() for name, x in inputs.items()}
    neutral["g"][3:] = 0.0
    neutral["beta"][3:] = 0.0
    _, state = run("chunk", [5], **neutral)
    cut = {name: x if name == "state" else x[:3] for name, x in neutral.items()}
    _, expected = run("chunk", [3], **cut)
    assert_close(state, expected, tolerance=1e-14)


@pytest.mark.parametrize("with_state", [True, False])
def test_single_step_for_decoding_is_the_recurrent_form(with_state: bool) -> None:
    """Without gradients, one token per sequence takes a path of its own; it must not touch the state it was given."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"q": (4, 2, 5), "k": (4, 2, 5), "v": (4, 6, 3), "g": (4, 6), "beta": (4, 6)}
    tensors = {name: torch.randn(*shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    inputs = DeltaInputs(*(tensors[name] for name in "qkv"), -tensors["g"].abs(), tensors["beta"].sigmoid())
    state = torch.randn(4, 6, 5, 3, dtype=torch.float64, generator=generator) if with_state else None
    before = None if state is None else state.clone()
    packing = ops.Packing([1, 1, 1, 1])
    expected = recurrent_gated_delta_rule(inputs, packing=packing, initial_state_NHKV=state)
    with torch.no_grad():
        actual = ops.gated_delta_rule(inputs, packing=packing, initial_state_NHKV=state)
    torch.testing.assert_close(actual.o_THV, expected.o_THV, rtol=0, atol=1e-13)
    torch.testing.assert_close(actual.state_NHKV, expected.state_NHKV, rtol=0, atol=1e-13)
    assert state is None or torch.equal(state, before)
