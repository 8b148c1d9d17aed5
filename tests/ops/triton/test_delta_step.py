"""The fused step of Gated DeltaNet is the reference's: outputs, carried states, and what drafts keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaCache, DeltaWeights, Packing, PendingTokens, reference
from qnext.ops import triton as gpu

from ..compare import assert_close
from ..test_delta_mixer import Sizes, make_cache, make_inputs, rows
from ..test_delta_pending import make_cache as make_empty_cache
from ..test_delta_pending import make_schedule
from .device import DEVICE, TOLERANCE, TOLERANCE_BF16, exact, here

SIZES = [Sizes(1, 3, 24, 40, 4), Sizes(2, 1, 12, 20, 5), Sizes(1, 1, 16, 8, 2)]
SLOTS = [5, 0, 3]


def mixer_arguments(inputs: dict[str, Any], lengths: list[int]) -> tuple[Any, ...]:
    qkvz_TX, ba_TY, *weights = inputs.values()
    return qkvz_TX, ba_TY, DeltaWeights(*weights)


def step(inputs: dict[str, Any], lengths: list[int], cache: DeltaCache) -> Tensor:
    """By the kernels, which must take the call."""
    arguments = here(mixer_arguments(inputs, lengths))
    packing = Packing(lengths, device=DEVICE)
    assert gpu.serves_gated_delta_mixer(*arguments, packing=packing, cache=cache)
    return ops.gated_delta_mixer(*arguments, packing=packing, cache=cache).cpu()


def wanted_step(inputs: dict[str, Any], lengths: list[int], cache: DeltaCache) -> Tensor:
    arguments = exact(mixer_arguments(inputs, lengths))
    return reference.gated_delta_mixer(*arguments, packing=Packing(lengths), cache=cache)


def assert_same_caches(ours: DeltaCache, theirs: DeltaCache, *, tolerance: float = TOLERANCE) -> None:
    """In the slots of the call; NaN stays where nobody writes."""
    slots = theirs.slots_N
    for name in ("conv", "state"):
        actual, wanted = getattr(ours, name).cpu(), getattr(theirs, name)
        assert_close(actual[slots], wanted[slots], tolerance=tolerance, name=name)
        assert torch.equal(actual.isnan(), wanted.isnan())


@pytest.mark.parametrize("length", [1, *(pytest.param(length, marks=pytest.mark.slow) for length in (2, 3)), 4])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_packed_steps(sizes: Sizes, length: int) -> None:
    """Continued and fresh sequences of different lengths; NaN in the slots of the fresh and of all others."""
    lengths = [length, 1, 5 - length]
    inputs = make_inputs(sum(lengths), sizes)
    ours, theirs = (make_cache(sizes, SLOTS, fresh=(1,)) for _ in range(2))
    ours, theirs = here(ours), exact(theirs)
    actual, wanted = step(inputs, lengths, ours), wanted_step(inputs, lengths, theirs)
    assert actual.dtype == torch.float32
    assert_close(actual, wanted, tolerance=TOLERANCE)
    assert_same_caches(ours, theirs)


def test_bf16_rows_are_rounded_once_at_the_end() -> None:
    inputs = make_inputs(4, SIZES[0], dtype=torch.bfloat16)
    ours, theirs = here(make_cache(SIZES[0], SLOTS[:2])), exact(make_cache(SIZES[0], SLOTS[:2]))
    actual, wanted = step(inputs, [3, 1], ours), wanted_step(inputs, [3, 1], theirs)
    assert actual.dtype == torch.bfloat16
    # few roundings fall to the other side; the interpreter cuts digits off, as much as a bf16 number is known to
    assert_close(actual, wanted.bfloat16(), tolerance=TOLERANCE_BF16)
    assert_same_caches(ours, theirs)


def test_tokens_one_by_one_have_the_same_bits() -> None:
    sizes, inputs = SIZES[1], make_inputs(4, SIZES[1])
    at_once, one_by_one = (here(make_cache(sizes, [2])) for _ in range(2))
    together = step(inputs, [4], at_once)
    alone = [step(rows(inputs, slice(t, t + 1)), [1], one_by_one) for t in range(4)]
    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(one_by_one.state[2], at_once.state[2]) and torch.equal(one_by_one.conv[2], at_once.conv[2])


def test_states_in_bf16_are_rounded_after_each_token() -> None:
    sizes, inputs = SIZES[0], make_inputs(2, SIZES[0])
    ours, theirs = (make_cache(sizes, SLOTS[:2]) for _ in range(2))
    ours, theirs = (cache._replace(state=cache.state.bfloat16()) for cache in (ours, theirs))
    ours = here(ours)
    for t in range(2):
        chosen = rows(inputs, torch.tensor([t, 1 - t]))
        arguments = mixer_arguments(chosen, [1, 1])
        wanted = reference.gated_delta_mixer(*arguments, packing=Packing([1, 1]), cache=theirs)
        assert_close(step(chosen, [1, 1], ours), wanted, tolerance=TOLERANCE_BF16)
    assert ours.state.dtype == torch.bfloat16
    assert_close(ours.state[SLOTS[:2]].cpu(), theirs.state[SLOTS[:2]], tolerance=TOLERANCE_BF16)
    packing = Packing([2], device=DEVICE)
    cache = ours._replace(slots_N=ours.slots_N[:1], is_fresh_N=ours.is_fresh_N[:1])
    assert not gpu.serves_gated_delta_mixer(*here(mixer_arguments(inputs, [2])), packing=packing, cache=cache)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [Sizes(2, 2, 12, 40, 3)], ids=str)
def test_drafts_accepted_and_rejected(sizes: Sizes, seed: int) -> None:
    """Random schedules of drafts and plain pieces, from memory of NaN and counts that nobody may believe."""
    lengths, slots, num_drafts = [5, 3, 4], [4, 0, 7], 3
    inputs = make_inputs(sum(lengths), sizes)
    starts = [0, 5, 8]
    ours, theirs = here(make_empty_cache(sizes, num_drafts)), exact(make_empty_cache(sizes, num_drafts))
    is_begun = [False] * 3
    for call in make_schedule(seed, lengths, num_drafts):
        call = [piece._replace(num_tokens=min(piece.num_tokens, 16)) for piece in call]
        index = [starts[p.sequence] + (p.start + i) % lengths[p.sequence] for p in call for i in range(p.num_tokens)]
        chosen, counts = rows(inputs, torch.tensor(index)), [piece.num_tokens for piece in call]
        view = {
            "slots_N": torch.tensor([slots[p.sequence] for p in call]),
            "is_fresh_N": torch.tensor([not is_begun[p.sequence] for p in call]),
            "is_draft_N": torch.tensor([p.is_draft for p in call]),
        }
        actual = step(chosen, counts, ours._replace(**here(view)))
        assert_close(actual, wanted_step(chosen, counts, theirs._replace(**view)), tolerance=TOLERANCE)
        assert_same_caches(ours._replace(**view), theirs._replace(**view))
        for piece in call:
            is_begun[piece.sequence] = True
            for cache in (ours, theirs):
                assert cache.pending is not None and cache.pending.num_accepted[slots[piece.sequence]] == 0
                cache.pending.num_accepted[slots[piece.sequence]] = piece.num_accepted if piece.is_draft else 0
    assert all(is_begun)
    slots_N = torch.tensor(slots)
    for cache, numbers in ((ours, slots_N.to(DEVICE)), (theirs, slots_N)):
        assert isinstance(cache.pending, PendingTokens)
        ops.apply_pending(cache.conv, cache.state, cache.pending, numbers)
    assert_same_caches(ours._replace(slots_N=slots_N), theirs._replace(slots_N=slots_N))


def test_a_draft_longer_than_its_space_is_refused() -> None:
    sizes, inputs = SIZES[0], here(make_inputs(3, SIZES[0]))
    cache = here(make_cache(sizes, [1]))
    drafting = here(make_empty_cache(sizes, 2))._replace(
        slots_N=cache.slots_N, is_fresh_N=~cache.is_fresh_N, is_draft_N=~cache.is_fresh_N
    )
    with pytest.raises(ValueError, match="a draft of 3 tokens"):
        ops.gated_delta_mixer(*mixer_arguments(inputs, [3]), packing=Packing([3], device=DEVICE), cache=drafting)
