"""The token mixer of Gated DeltaNet: every backend against the formula in fp64, and bits that must agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache as once
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaCache, DeltaWeights, Packing
from qnext.ops.backends import cpu_kernels
from qnext.ops.reference import gated_delta_mixer as reference_mixer
from qnext.ops.torch import gated_delta_mixer as torch_mixer

from .compare import LENGTHS, RAGGED, assert_close, assert_same_function, randn

native = cpu_kernels()
needs_native = pytest.mark.skipif(native is None, reason="the native kernels are not built or not wanted")

# 6e-8 per rounding, sums of up to 128 terms in order, and a norm that divides by small outputs; measured 3e-7
TOLERANCE = 2e-6


class Sizes(NamedTuple):
    key_heads: int
    repeats: int
    key_dim: int
    value_dim: int
    width: int

    @property
    def heads(self) -> int:
        return self.key_heads * self.repeats

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim


# together they reach every number of registers that the kernel takes at a time, and its remainders
SIZES = [
    Sizes(2, 3, 32, 48, 4),
    Sizes(1, 1, 16, 144, 2),
    Sizes(3, 2, 48, 112, 5),
    Sizes(1, 2, 128, 128, 4),
    Sizes(2, 1, 16, 32, 1),
    Sizes(2, 1, 32, 16, 8),
]


@pytest.fixture(params=range(native.best_isa() + 1 if native else 0))
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the kernel on every instruction set that this CPU has."""
    assert native is not None
    native.force_isa(request.param)
    with torch.inference_mode():
        yield request.param
    native.force_isa(native.best_isa())


def make_inputs(num_tokens: int, sizes: Sizes, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Projections and parameters; A and dt_bias as initialised, so that some heads remember long."""
    steps = torch.logspace(-3, -1, sizes.heads, dtype=torch.float64)
    inputs: dict[str, Any] = {
        "qkvz_TX": randn(num_tokens, sizes.channels + sizes.heads * sizes.value_dim, seed=0),
        "ba_TY": randn(num_tokens, 2 * sizes.heads, seed=1),
        "conv_weight_C1W": randn(sizes.channels, 1, sizes.width, seed=2, scale=0.5),
        "A_log_H": torch.linspace(0.1, 16, sizes.heads, dtype=torch.float64).log(),
        "dt_bias_H": steps + (-(-steps).expm1()).log(),
        "norm_weight_V": 1 + randn(sizes.value_dim, seed=3, scale=0.2),
    }
    inputs = {name: x.to(torch.float32).to(dtype) for name, x in inputs.items()}  # all widths start from equal numbers
    return {**inputs, "eps": 1e-6, "num_key_heads": sizes.key_heads, "key_head_dim": sizes.key_dim}


def make_cache(
    sizes: Sizes,
    slots: list[int],
    *,
    fresh: tuple[int, ...] = (),
    num_slots: int = 8,
    dtype: torch.dtype = torch.float32,
) -> DeltaCache:
    """Slots full of random numbers; NaN in those of the sequences `fresh` and where nobody reads."""
    conv = randn(num_slots, sizes.width - 1, sizes.channels, seed=4, dtype=torch.float32).to(dtype)
    state = randn(num_slots, sizes.heads, sizes.key_dim, sizes.value_dim, seed=5, dtype=torch.float32).to(dtype)
    for slot in range(num_slots):
        if slot not in slots or slots.index(slot) in fresh:
            conv[slot] = state[slot] = float("nan")
    is_fresh_N = torch.tensor([n in fresh for n in range(len(slots))])
    return DeltaCache(conv, state, torch.tensor(slots), is_fresh_N, has_fresh=bool(fresh))


def rows(inputs: dict[str, Any], chosen: slice | Tensor) -> dict[str, Any]:
    return {**inputs, "qkvz_TX": inputs["qkvz_TX"][chosen], "ba_TY": inputs["ba_TY"][chosen]}


def run(
    inputs: dict[str, Any],
    lengths: list[int],
    cache: DeltaCache | None,
    op: Callable[..., Tensor] = ops.gated_delta_mixer,
) -> Tensor:
    qkvz_TX, ba_TY, *weights = inputs.values()
    return op(qkvz_TX, ba_TY, DeltaWeights(*weights), packing=Packing(lengths), cache=cache)


@once
def exact_rows(
    sizes: Sizes, lengths: tuple[int, ...], slots: tuple[int, ...], fresh: tuple[int, ...], *changes: tuple[str, Tensor]
) -> tuple[Tensor, DeltaCache]:
    """The formula in fp64, computed once for all instruction sets: rows, and the cache behind them."""
    cache = make_cache(sizes, list(slots), fresh=fresh, dtype=torch.float64)
    inputs = make_inputs(sum(lengths), sizes, dtype=torch.float64) | {name: x.double() for name, x in changes}
    return run(inputs, list(lengths), cache, reference_mixer), cache


def assert_matches_reference(
    sizes: Sizes, lengths: list[int], slots: list[int], fresh: tuple[int, ...] = (), **changes: Tensor
) -> None:
    wanted, wanted_cache = exact_rows(sizes, tuple(lengths), tuple(slots), fresh, *changes.items())
    cache = make_cache(sizes, slots, fresh=fresh)
    actual = run({**make_inputs(sum(lengths), sizes), **changes}, lengths, cache)
    assert actual.dtype == torch.float32
    assert_close(actual, wanted, tolerance=TOLERANCE)
    assert_close(cache.state[slots], wanted_cache.state[slots], tolerance=TOLERANCE, name="state")
    if sizes.width > 1:
        assert_close(cache.conv[slots], wanted_cache.conv[slots], tolerance=TOLERANCE, name="conv")
    others = [slot for slot in range(len(cache.conv)) if slot not in slots]
    assert cache.conv[others].isnan().all() and cache.state[others].isnan().all()


@pytest.mark.parametrize("lengths", [[1], [65], [1000], RAGGED], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, Sizes(2, 3, 8, 12, 4)], ids=str)
def test_torch_is_the_reference(sizes: Sizes, lengths: list[int]) -> None:
    """In fp64, with carried states and without; slots that nobody names keep their NaN."""
    inputs = make_inputs(sum(lengths), sizes, dtype=torch.float64)
    slots = [5, 0, 7, 2, 4, 1][: len(lengths)]
    ours, theirs = (make_cache(sizes, slots, fresh=(0, 2), dtype=torch.float64) for _ in range(2))
    assert_close(
        run(inputs, lengths, ours, torch_mixer), run(inputs, lengths, theirs, reference_mixer), tolerance=1e-12
    )
    assert_close(ours.state[slots], theirs.state[slots], tolerance=1e-12, name="state")
    assert torch.equal(ours.conv.nan_to_num(7.0), theirs.conv.nan_to_num(7.0))
    assert torch.equal(ours.state.isnan(), theirs.state.isnan())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[4], Sizes(2, 3, 8, 12, 4)], ids=str)
def test_torch_has_the_gradients_of_the_reference(sizes: Sizes, dtype: torch.dtype) -> None:
    lengths = [1, 64, 3, 66]
    inputs = make_inputs(sum(lengths), sizes, dtype=dtype)
    numbers = {name: x for name, x in inputs.items() if not isinstance(x, Tensor)}
    assert_same_function(
        lambda **x: (run({**x, **numbers}, lengths, None, torch_mixer),),
        lambda **x: (run({**x, **numbers}, lengths, None, reference_mixer),),
        {name: x for name, x in inputs.items() if isinstance(x, Tensor)},
        tolerance=1e-12 if dtype == torch.float64 else 2e-5,
        # the norm divides by small outputs, twice on the way back
        gradient_tolerance=1e-10 if dtype == torch.float64 else 1e-4,
    )


@needs_native
@pytest.mark.parametrize("length", LENGTHS)
def test_native_is_the_reference(length: int, isa: int) -> None:
    assert_matches_reference(SIZES[0], [length], [3])


@needs_native
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("lengths", [[1, 1, 1], RAGGED], ids=str)
def test_packed_sequences_of_any_sizes(sizes: Sizes, lengths: list[int], isa: int) -> None:
    slots = [5, 0, 7, 2, 4, 1][: len(lengths)]
    assert_matches_reference(sizes, lengths, slots)
    assert_matches_reference(sizes, lengths, slots, fresh=(0, 2))


@needs_native
def test_released_sizes(isa: int) -> None:
    assert_matches_reference(Sizes(16, 2, 128, 128, 4), [2, 20], [1, 0], fresh=(1,))


@needs_native
def test_decays_from_all_to_nothing(isa: int) -> None:
    """exp(g) from 1 to an exact zero, and beta from 0 to 1."""
    sizes = SIZES[0]
    gates_TY = torch.linspace(-200, 200, 2 * sizes.heads * 40).view(40, -1)[:, torch.randperm(2 * sizes.heads)]
    assert_matches_reference(sizes, [40], [0], ba_TY=gates_TY)


@needs_native
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_no_cut_of_the_tokens_changes_a_bit(sizes: Sizes, isa: int) -> None:
    num_tokens = 139
    inputs = make_inputs(num_tokens, sizes)
    whole_cache = make_cache(sizes, [2], fresh=(0,))
    whole = run(inputs, [num_tokens], whole_cache)
    for ends in ([1, 64, num_tokens], [63, 66, 67, 130, num_tokens], list(range(1, num_tokens + 1))):
        cache = make_cache(sizes, [2], fresh=(0,))
        parts = []
        for start, end in pairwise([0, *ends]):
            parts.append(run(rows(inputs, slice(start, end)), [end - start], cache))
            cache = cache._replace(is_fresh_N=torch.tensor([False]), has_fresh=end == 1)
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(cache.state[2], whole_cache.state[2])
        assert torch.equal(cache.conv[2], whole_cache.conv[2])


@needs_native
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], RAGGED], ids=str)
def test_company_changes_no_bit(lengths: list[int], isa: int) -> None:
    sizes, slots = SIZES[3], [5, 0, 7, 2, 4, 1][: len(lengths)]
    inputs = make_inputs(sum(lengths), sizes)
    together_cache = make_cache(sizes, slots, fresh=(1,))
    together = run(inputs, lengths, together_cache).split(lengths)
    alone_cache = make_cache(sizes, slots, fresh=(1,))
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for n in reversed(range(len(lengths))):
        one = alone_cache._replace(
            slots_N=torch.tensor([slots[n]]), is_fresh_N=torch.tensor([n == 1]), has_fresh=n == 1
        )
        assert torch.equal(run(rows(inputs, slice(starts[n], starts[n + 1])), [lengths[n]], one), together[n])
    assert torch.equal(alone_cache.state[slots], together_cache.state[slots])
    assert torch.equal(alone_cache.conv[slots], together_cache.conv[slots])


@needs_native
def test_the_number_of_threads_changes_no_bit(isa: int) -> None:
    assert native is not None
    sizes, lengths = SIZES[2], [1, 70, 5]
    results = []
    try:
        for count in (1, 2, 5):
            native.set_num_threads(count)
            cache = make_cache(sizes, [1, 0, 2])
            results.append((run(make_inputs(76, sizes), lengths, cache), cache.state[:3], cache.conv[:3]))
    finally:
        native.set_num_threads(torch.get_num_threads())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
def test_without_a_cache_every_sequence_starts_from_zeros(isa: int) -> None:
    inputs = make_inputs(sum(RAGGED), SIZES[0])
    slots = list(range(len(RAGGED)))
    cached = run(inputs, RAGGED, make_cache(SIZES[0], slots, fresh=tuple(slots)))
    assert torch.equal(run(inputs, RAGGED, None), cached)


@needs_native
def test_narrow_parameters_and_strided_projections(isa: int) -> None:
    inputs = make_inputs(5, SIZES[0])
    names = ("conv_weight_C1W", "A_log_H", "dt_bias_H", "norm_weight_V")
    narrow = {name: inputs[name].bfloat16() for name in names}
    strided = {name: torch.cat([inputs[name]] * 2, dim=1).chunk(2, dim=1)[1] for name in ("qkvz_TX", "ba_TY")}
    wanted = run({**inputs, **{name: x.float() for name, x in narrow.items()}}, [5], None)
    assert torch.equal(run({**inputs, **narrow, **strided}, [5], None), wanted)


@needs_native
def test_wrong_arguments_are_refused(isa: int) -> None:
    sizes = SIZES[0]
    inputs = make_inputs(4, sizes)
    for slot in (-1, 8):
        cache = make_cache(sizes, [1])._replace(slots_N=torch.tensor([slot]))
        before = cache.state[1].clone()
        with pytest.raises(IndexError, match=str(slot)):
            run(inputs, [4], cache)
        assert torch.equal(cache.state[1], before)
    for wrong in ({"num_key_heads": 3}, {"ba_TY": inputs["ba_TY"][:, 1:]}, {"dt_bias_H": inputs["dt_bias_H"][1:]}):
        with pytest.raises(ValueError, match="do not fit"):
            run({**inputs, **wrong}, [4], make_cache(sizes, [1]))
    with pytest.raises(ValueError, match="do not fit"):
        run(inputs, [3], make_cache(sizes, [1]))
    with pytest.raises(ValueError, match="slots of"):
        run(inputs, [4], make_cache(sizes._replace(width=3), [1]))


@pytest.mark.parametrize("sizes", [Sizes(2, 3, 8, 12, 4), Sizes(2, 3, 24, 16, 4), Sizes(1, 2, 16, 16, 9)], ids=str)
def test_other_sizes_are_left_to_torch(sizes: Sizes) -> None:
    inputs = make_inputs(7, sizes)
    cache, wanted_cache = make_cache(sizes, [4, 1], fresh=(1,)), make_cache(sizes, [4, 1], fresh=(1,))
    with torch.inference_mode():
        assert torch.equal(run(inputs, [5, 2], cache), run(inputs, [5, 2], wanted_cache, torch_mixer))
    assert torch.equal(cache.state[[1, 4]], wanted_cache.state[[1, 4]])


def test_narrow_slots_are_left_to_torch() -> None:
    cache = make_cache(SIZES[0], [4])
    cache = cache._replace(conv=cache.conv.bfloat16())
    wanted_cache = cache._replace(conv=cache.conv.clone(), state=cache.state.clone())
    inputs = make_inputs(7, SIZES[0])
    with torch.inference_mode():
        assert torch.equal(run(inputs, [7], cache), run(inputs, [7], wanted_cache, torch_mixer))
    assert torch.equal(cache.conv[4], wanted_cache.conv[4])


# The norm divides by small outputs, twice on the way back; A_log and dt_bias add tokens that cancel. Torch: 3e-5.
GRADIENT_TOLERANCE = 1e-4


def assert_has_gradients_of(definition: Callable[..., Tensor], sizes: Sizes, lengths: list[int]) -> None:
    inputs = make_inputs(sum(lengths), sizes)
    numbers = {name: x for name, x in inputs.items() if not isinstance(x, Tensor)}
    assert_same_function(
        lambda **x: (run({**x, **numbers}, lengths, None),),
        lambda **x: (run({**x, **numbers}, lengths, None, definition),),
        {name: x for name, x in inputs.items() if isinstance(x, Tensor)},
        tolerance=TOLERANCE,
        gradient_tolerance=GRADIENT_TOLERANCE,
    )


@pytest.fixture
def training_isa(isa: int) -> Iterator[int]:
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield isa


@needs_native
@pytest.mark.parametrize("lengths", [*([length] for length in LENGTHS), RAGGED], ids=str)
def test_native_has_the_gradients_of_the_reference(lengths: list[int], training_isa: int) -> None:
    assert_has_gradients_of(torch_mixer, SIZES[0], lengths)  # itself the reference in fp64: see above


@needs_native
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_gradients_of_any_sizes(sizes: Sizes, training_isa: int) -> None:
    assert_has_gradients_of(reference_mixer, sizes, [3, 35])


@needs_native
def test_gradients_of_decays_from_all_to_nothing(training_isa: int) -> None:
    """exp(g) from 1 to an exact zero, beta from 0 to 1, and rows of zeros: no gradient is lost to 0 * inf."""
    sizes = SIZES[0]
    inputs = make_inputs(40, sizes)
    inputs["ba_TY"] = torch.linspace(-200, 200, 2 * sizes.heads * 40).view(40, -1)
    inputs["qkvz_TX"][7:20] = 0.0
    grads = []
    for op in (ops.gated_delta_mixer, torch_mixer):
        tensors = {name: x.clone().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
        run({**inputs, **tensors}, [40], None, op).square().sum().backward()
        grads.append({name: x.grad for name, x in tensors.items()})
    for name, grad in grads[0].items():
        assert grad is not None and grad.any(), name
        assert_close(grad, grads[1][name], tolerance=GRADIENT_TOLERANCE, name=name)


@needs_native
def test_no_gradient_crosses_a_boundary_or_depends_on_threads(training_isa: int) -> None:
    """A loss on the second of three sequences: the rows of the others get exact zeros."""
    assert native is not None
    results = []
    try:
        for count in (1, 3):
            native.set_num_threads(count)
            inputs = make_inputs(139, SIZES[2])
            tensors = {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
            run(inputs, [64, 70, 5], None)[64:134].square().sum().backward()
            results.append({name: x.grad for name, x in tensors.items()})
    finally:
        native.set_num_threads(torch.get_num_threads())
    for name, grad in results[0].items():
        assert grad is not None and torch.equal(grad, results[1][name])
    for name in ("qkvz_TX", "ba_TY"):
        assert not results[0][name][:64].any() and not results[0][name][134:].any()
        assert results[0][name][64:134].any(dim=1).all()


def test_gradients_with_a_cache_are_left_to_torch() -> None:
    inputs = make_inputs(70, SIZES[0])
    tensors = {name: x.requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}
    run(inputs, [3, 67], make_cache(SIZES[0], [1, 0])).square().sum().backward()
    for name, x in tensors.items():
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any(), name
