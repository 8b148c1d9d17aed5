"""The gated delta rule in chunks is the reference's: outputs, last states, and the mixer around it over a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaInputs, Packing, reference
from qnext.ops import triton as gpu
from qnext.ops.reference.delta import gated_delta_rule as formula

from ..compare import assert_close, randn
from ..test_delta_mixer import Sizes, make_cache, make_inputs
from ..test_delta_pending import make_cache as make_empty_cache
from .device import DEVICE, TOLERANCE, TOLERANCE_BF16, exact, here
from .test_delta_step import assert_same_caches, mixer_arguments, step, wanted_step

LENGTHS = [5, 16, 17, 63, 64, 65, 130]
SIZES = Sizes(2, 2, 12, 20, 4)


def make_rule(num_tokens: int, *, value_dim: int = 20) -> DeltaInputs:
    """Two key heads and four of values, no dim a power of two."""
    shapes = [(2, 12), (2, 12), (4, value_dim), (4,), (4,)]
    rows = [randn(num_tokens, *shape, seed=i) for i, shape in enumerate(shapes)]
    q, k, v, g, beta = rows
    decay = torch.nn.functional.softplus(g * 2.0)
    return DeltaInputs(*(x.float() for x in (ops.l2_norm(q), ops.l2_norm(k), v, -decay, beta.sigmoid())))


def assert_is_the_formula(inputs: DeltaInputs, lengths: list[int], state: Tensor | None = None) -> None:
    actual = gpu.chunked_delta_rule(
        here(inputs), packing=Packing(lengths, device=DEVICE), initial_state_NHKV=here(state)
    )
    wanted = formula(exact(inputs), packing=Packing(lengths), initial_state_NHKV=exact(state))
    for name, ours, theirs in zip(actual._fields, actual, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours.cpu(), theirs, tolerance=TOLERANCE, name=name)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_sequence_from_a_state(length: int) -> None:
    assert_is_the_formula(make_rule(length), [length], randn(1, 4, 12, 20, seed=9, dtype=torch.float32))


def test_the_largest_heads() -> None:
    """Keys and values of 256 dims."""
    q, k, v, g, beta = make_rule(18, value_dim=256)
    q, k = (ops.l2_norm(randn(18, 2, 256, seed=seed)).float() for seed in (0, 1))
    assert_is_the_formula(DeltaInputs(q, k, v, g, beta), [18], randn(1, 4, 256, 256, seed=9, dtype=torch.float32))


def test_packed_sequences_from_states() -> None:
    """Two blocks of values. Strides are not those of whole tensors: q and k lie in one, v among other heads."""
    lengths = [1, 33, 5, 32]
    q, k, v, g, beta = make_rule(sum(lengths), value_dim=40)
    q, k = torch.cat([q, k], dim=1).chunk(2, dim=1)
    v = torch.cat([v, torch.full_like(v, float("nan"))], dim=1)[:, :4]
    state = randn(len(lengths), 4, 12, 40, seed=9, dtype=torch.float32)
    assert_is_the_formula(DeltaInputs(q, k, v, g, beta), lengths, state)


def test_one_key_over_and_over_is_solved_without_loss() -> None:
    """Powers of its matrix have entries in the thousands, which would have to cancel."""
    q, k, v, g, beta = make_rule(37)
    equal = DeltaInputs(q, k[:1].expand_as(k), v, g * 1e-3, torch.ones_like(beta))
    assert_is_the_formula(equal, [37])


def test_decays_of_every_size() -> None:
    """Some forget everything at once, where exp(g) is zero in fp32; what follows keeps its digits."""
    q, k, v, g, beta = make_rule(37)
    g[3::7] = float("-inf")
    g[4::7] = -88.0
    g[5::7] = 0.0
    assert_is_the_formula(DeltaInputs(q, k, v, g, beta), [37], randn(1, 4, 12, 20, seed=9, dtype=torch.float32))


def test_the_mixer_over_slots() -> None:
    """Continued and fresh sequences, one of a single token; NaN in the slots of the fresh and of all others."""
    lengths, slots, sizes = [17, 1, 34], [5, 0, 3], SIZES
    inputs = make_inputs(sum(lengths), sizes)
    ours, theirs = here(make_cache(sizes, slots, fresh=(1,))), exact(make_cache(sizes, slots, fresh=(1,)))
    assert_close(step(inputs, lengths, ours), wanted_step(inputs, lengths, theirs), tolerance=TOLERANCE)
    assert_same_caches(ours, theirs)


def test_accepted_drafts_come_before_a_piece() -> None:
    inputs = make_inputs(20, SIZES)
    slots_N, yes_N = torch.tensor([2]), torch.tensor([True])
    caches = here(make_empty_cache(SIZES, 3)), exact(make_empty_cache(SIZES, 3))
    for run, cache in zip((step, wanted_step), caches, strict=True):
        place = here if run is step else exact
        view = cache._replace(slots_N=place(slots_N), is_fresh_N=place(yes_N), is_draft_N=place(yes_N))
        first = {**inputs, "qkvz_TX": inputs["qkvz_TX"][:3], "ba_TY": inputs["ba_TY"][:3]}
        run(first, [3], view)
        assert cache.pending is not None
        cache.pending.num_accepted[2] = 2
    views = [
        cache._replace(slots_N=place(slots_N), is_fresh_N=place(~yes_N), is_draft_N=None)
        for cache, place in zip(caches, (here, exact), strict=True)
    ]
    actual, wanted = step(inputs, [20], views[0]), wanted_step(inputs, [20], views[1])
    assert_close(actual, wanted, tolerance=TOLERANCE)
    assert_same_caches(*views)
    assert views[0].pending is not None and views[0].pending.num_accepted[2] == 0


def test_without_a_cache_rows_in_bf16_are_rounded_once() -> None:
    inputs = make_inputs(35, SIZES, dtype=torch.bfloat16)
    arguments, packing = here(mixer_arguments(inputs, [35])), Packing([35], device=DEVICE)
    assert gpu.serves_gated_delta_mixer(*arguments, packing=packing)
    actual = ops.gated_delta_mixer(*arguments, packing=packing).cpu()
    wanted = reference.gated_delta_mixer(*exact(mixer_arguments(inputs, [35])), packing=Packing([35]))
    assert actual.dtype == torch.bfloat16
    assert_close(actual, wanted.bfloat16(), tolerance=TOLERANCE_BF16)


def test_what_chunks_do_not_serve() -> None:
    inputs, packing = make_inputs(17, SIZES), Packing([17], device=DEVICE)
    arguments, cache = here(mixer_arguments(inputs, [17])), here(make_cache(SIZES, [1]))
    for other in (cache._replace(state=cache.state.bfloat16()), cache._replace(is_draft_N=cache.is_fresh_N)):
        assert not gpu.serves_gated_delta_mixer(*arguments, packing=packing, cache=other)
    assert gpu.serves_gated_delta_mixer(*arguments, packing=packing, cache=cache)
    with torch.enable_grad():
        asking = [arguments[0].clone().requires_grad_(), *arguments[1:]]
        assert not gpu.serves_gated_delta_mixer(*asking, packing=packing, cache=cache)
