"""States in bf16: rounded where DeltaCache says and nowhere else, whatever was drafted, cut or computed beside them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaCache
from qnext.ops.backends import cpu_kernels
from qnext.ops.reference import gated_delta_mixer as reference_mixer
from qnext.ops.torch import gated_delta_mixer as torch_mixer

from .compare import assert_close, relative_rms
from .test_delta_mixer import SIZES, Sizes, isa, make_inputs, rows, run
from .test_delta_mixer import make_cache as make_plain_cache
from .test_delta_pending import (
    NAN,
    NUMS_DRAFTS,
    Mixer,
    Piece,
    make_cache,
    make_schedule,
    make_streams,
    piece_inputs,
    view,
)

needs_native = pytest.mark.skipif(cpu_kernels() is None, reason="the native kernels are not built or not wanted")
__all__ = ["isa"]  # a fixture

GRID = ops.DELTA_CHUNK_SIZE
# A number in the middle between two of bf16, as far as fp32 can tell, may be rounded to the other one, 2^-8 away. One
# in some thousand is, after a hundred tokens. Measured 3e-4; one rounding too many or too few makes 2e-3 of the state.
TOLERANCE = 5e-4


def with_lengths(cache: DeltaCache, contexts: list[int], prompts: list[int] | None) -> DeltaCache:
    return cache._replace(
        context_lengths_N=torch.tensor(contexts),
        prompt_lengths_N=None if prompts is None else torch.tensor(prompts),
    )


def stored_at(start: int, end: int, prompt: int) -> list[int]:
    """The positions between `start` and `end`, both among them, where the state is rounded."""
    return [p for p in range(start, end + 1) if p in (start, end, prompt) or p > prompt or p % GRID == 0]


def run_by_hand(inputs: dict[str, Any], cache: DeltaCache, start: int, prompt: int, op: Mixer) -> tuple[Tensor, Tensor]:
    """The same with a wide state, which is rounded by torch between calls. `cache` is of one sequence, in bf16."""
    wide = cache._replace(state=cache.state.float(), context_lengths_N=None, prompt_lengths_N=None)
    num_tokens = len(inputs["qkvz_TX"])
    parts = []
    for first, last in pairwise(stored_at(start, start + num_tokens, prompt)):
        parts.append(run(rows(inputs, slice(first - start, last - start)), [last - first], wide, op))
        wide.state.copy_(wide.state.bfloat16())
        wide = wide._replace(is_fresh_N=torch.tensor([False]), has_fresh=False)
    return torch.cat(parts), wide.state


@needs_native
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("start", "num_tokens", "prompt"),
    [(0, 1, 0), (0, 150, 150), (0, 128, 300), (37, 100, 137), (64, 9, 64), (3, 90, 80), (50, 5, 20), (200, 3, 203)],
)
def test_rounded_where_it_is_promised(sizes: Sizes, start: int, num_tokens: int, prompt: int, isa: int) -> None:
    inputs = make_inputs(num_tokens, sizes)

    def make() -> DeltaCache:
        cache = make_plain_cache(sizes, [2], fresh=(0,) if start == 0 else ())
        return cache._replace(state=cache.state.bfloat16())

    by_hand = make()
    wanted, wanted_state = run_by_hand(inputs, by_hand, start, prompt, ops.gated_delta_mixer)
    cache = make()
    out = run(inputs, [num_tokens], with_lengths(cache, [start + num_tokens], [prompt]))
    assert torch.equal(out, wanted)
    assert cache.state.dtype == torch.bfloat16 and torch.equal(cache.state[2].float(), wanted_state[2])
    assert torch.equal(cache.conv[2], by_hand.conv[2])
    assert cache.state[[0, 1, *range(3, 8)]].isnan().all()


@pytest.mark.parametrize(("start", "num_tokens", "prompt"), [(0, 150, 150), (37, 100, 300), (3, 90, 80), (0, 1, 1)])
@pytest.mark.parametrize("mixer", [torch_mixer, reference_mixer], ids=["torch", "reference"])
@torch.inference_mode()
def test_torch_and_the_reference_round_there_too(start: int, num_tokens: int, prompt: int, mixer: Mixer) -> None:
    sizes = Sizes(2, 3, 8, 12, 4)
    inputs = make_inputs(num_tokens, sizes)
    cache, by_hand = (make_plain_cache(sizes, [2], fresh=(0,) if start == 0 else ()) for _ in range(2))
    cache, by_hand = (x._replace(state=x.state.bfloat16()) for x in (cache, by_hand))
    wanted, wanted_state = run_by_hand(inputs, by_hand, start, prompt, mixer)
    out = run(inputs, [num_tokens], with_lengths(cache, [start + num_tokens], [prompt]), mixer)
    assert_close(out, wanted, tolerance=1e-5)
    assert_close(cache.state[2], wanted_state[2], tolerance=1e-5, name="state")


@needs_native
@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
def test_cuts_on_the_grid_and_company_change_no_bit(sizes: Sizes, isa: int) -> None:
    """Prompts of 150 and 70 tokens with 13 and 20 answered ones behind them: cut, alone, together."""
    lengths, prompts, slots = [163, 90], [150, 70], [4, 1]
    streams = make_streams(sizes, lengths)
    both = make_plain_cache(sizes, slots, fresh=(0, 1))
    both = both._replace(state=both.state.bfloat16())
    inputs = {**streams[0], **{name: torch.cat([s[name] for s in streams]) for name in ("qkvz_TX", "ba_TY")}}
    together = run(inputs, lengths, with_lengths(both, lengths, prompts)).split(lengths)
    for n, ends in enumerate(([64, 128, 150, 151, 163], [64, 70, *range(71, 91)])):
        cache = make_plain_cache(sizes, [slots[n]], fresh=(0,))
        cache = cache._replace(state=cache.state.bfloat16())
        parts = []
        for start, end in pairwise([0, *ends]):
            now = with_lengths(cache, [end], [prompts[n]])
            parts.append(run(rows(streams[n], slice(start, end)), [end - start], now))
            cache = cache._replace(is_fresh_N=torch.tensor([False]), has_fresh=False)
        assert torch.equal(torch.cat(parts), together[n])
        assert torch.equal(cache.state[slots[n]], both.state[slots[n]])
        assert torch.equal(cache.conv[slots[n]], both.conv[slots[n]])


def run_schedule(
    streams: list[dict[str, Any]],
    calls: list[list[Piece]],
    cache: DeltaCache,
    slots: list[int],
    op: Mixer,
    wrong: float,
) -> list[Tensor]:
    """Outputs of the accepted tokens, per sequence; every token is behind the prompt."""
    assert cache.pending is not None
    started: set[int] = set()
    outputs: list[list[Tensor]] = [[] for _ in streams]
    for call in calls:
        lengths = [piece.num_tokens for piece in call]
        now = with_lengths(view(cache, call, slots, started), [p.start + p.num_tokens for p in call], [0 for _ in call])
        out = run(piece_inputs(streams, call, wrong), lengths, now, op)
        for piece, part in zip(call, out.split(lengths), strict=True):
            outputs[piece.sequence].append(part[: piece.num_accepted])
            if piece.is_draft:
                cache.pending.num_accepted[slots[piece.sequence]] = piece.num_accepted
            started.add(piece.sequence)
    return [torch.cat(parts) for parts in outputs]


def token_by_token(stream: dict[str, Any], sizes: Sizes, slot: int, op: Mixer) -> tuple[Tensor, DeltaCache]:
    cache = make_cache(sizes, 1)
    cache = cache._replace(state=cache.state.bfloat16())
    calls = [[Piece(0, t, 1, False, 1)] for t in range(len(stream["qkvz_TX"]))]
    return run_schedule([stream], calls, cache, [slot], op, NAN)[0], cache


def assert_windows_give_the_bits_of_token_by_token(sizes: Sizes, num_drafts: int) -> None:
    lengths, slots = [23, 75, 1, 14], [5, 0, 7, 2]
    streams = make_streams(sizes, lengths)
    wanted = [token_by_token(s, sizes, slot, ops.gated_delta_mixer) for s, slot in zip(streams, slots, strict=True)]
    for seed in range(4):
        cache = make_cache(sizes, num_drafts)
        cache = cache._replace(state=cache.state.bfloat16())
        calls = make_schedule(seed, lengths, num_drafts)
        outputs = run_schedule(streams, calls, cache, slots, ops.gated_delta_mixer, NAN)
        assert cache.pending is not None
        ops.apply_pending(cache.conv, cache.state, cache.pending, torch.tensor(slots))
        for n, slot in enumerate(slots):
            assert torch.equal(outputs[n], wanted[n][0])
            assert torch.equal(cache.state[slot], wanted[n][1].state[slot])
            assert torch.equal(cache.conv[slot], wanted[n][1].conv[slot])


@needs_native
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_windows_give_the_bits_of_token_by_token(sizes: Sizes, isa: int) -> None:
    """Every two of sizes, instruction set and number of drafts."""
    num_drafts = NUMS_DRAFTS[(SIZES.index(sizes) + isa) % len(NUMS_DRAFTS)]
    assert_windows_give_the_bits_of_token_by_token(sizes, num_drafts)


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("num_drafts", NUMS_DRAFTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_windows_give_the_bits_of_token_by_token(sizes: Sizes, num_drafts: int, isa: int) -> None:
    assert_windows_give_the_bits_of_token_by_token(sizes, num_drafts)


@pytest.mark.parametrize("mixer", [torch_mixer, reference_mixer], ids=["torch", "reference"])
@pytest.mark.parametrize("sizes", [SIZES[0], Sizes(2, 3, 8, 12, 4)], ids=str)
def test_windows_on_torch_and_the_reference(sizes: Sizes, mixer: Mixer) -> None:
    lengths, slots = [23, 40, 14], [5, 0, 7]
    streams = make_streams(sizes, lengths)
    wanted = [token_by_token(s, sizes, slot, reference_mixer)[0] for s, slot in zip(streams, slots, strict=True)]
    for seed in range(3):
        cache = make_cache(sizes, 3)
        cache = cache._replace(state=cache.state.bfloat16())
        calls = make_schedule(seed, lengths, 3)
        outputs = run_schedule(streams, calls, cache, slots, mixer, 3.0)
        for out, alone in zip(outputs, wanted, strict=True):
            assert_close(out, alone, tolerance=TOLERANCE)


@needs_native
@pytest.mark.parametrize(("start", "prompt"), [(0, 150), (0, 20), (37, 300), (37, 100)])
def test_native_is_the_reference(start: int, prompt: int, isa: int) -> None:
    """Both round at the same places: another one would be seen."""
    sizes, num_tokens = SIZES[0], 120
    inputs = make_inputs(num_tokens, sizes)
    caches = [make_plain_cache(sizes, [2], fresh=() if start else (0,)) for _ in range(3)]
    ours, theirs, wide = (
        cache._replace(state=cache.state.bfloat16().to(dtype))
        for cache, dtype in zip(caches, (torch.bfloat16, torch.bfloat16, torch.float32), strict=True)
    )
    out = run(inputs, [num_tokens], with_lengths(ours, [start + num_tokens], [prompt]))
    wanted = run(inputs, [num_tokens], with_lengths(theirs, [start + num_tokens], [prompt]), reference_mixer)
    run(inputs, [num_tokens], wide)
    assert_close(out, wanted, tolerance=TOLERANCE)
    assert_close(ours.state[2], theirs.state[2], tolerance=TOLERANCE, name="state")
    assert relative_rms(wide.state[2], theirs.state[2]) > 3 * TOLERANCE
