"""Drafted tokens that become part of a sequence only when they are accepted: the same bits as if they came in order."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache as once
from itertools import cycle
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import DeltaCache, DeltaWeights, Packing, PendingTokens, reference
from qnext.ops import torch as pytorch
from qnext.ops.backends import cpu_kernels

from .compare import assert_close
from .test_delta_mixer import SIZES, TOLERANCE, Sizes, isa, make_inputs, rows, run

native = cpu_kernels()
needs_native = pytest.mark.skipif(native is None, reason="the native kernels are not built or not wanted")
__all__ = ["isa"]  # a fixture

NUM_SLOTS = 9
NAN = float("nan")
Mixer = Callable[..., Tensor]


def make_cache(sizes: Sizes, num_drafts: int, dtype: torch.dtype = torch.float32) -> DeltaCache:
    """Nothing but NaN, and counts that no call may believe."""
    state_shape = (sizes.heads, sizes.key_dim, sizes.value_dim)
    pending = PendingTokens.empty(
        NUM_SLOTS,
        num_drafts,
        num_channels=sizes.channels,
        num_key_heads=sizes.key_heads,
        state_shape=state_shape,
        device="cpu",
    )
    pending = PendingTokens(*(torch.full_like(x, NAN, dtype=dtype) for x in pending[:-1]), pending.num_accepted)
    pending.num_accepted.fill_(-77)
    return DeltaCache(
        torch.full((NUM_SLOTS, sizes.width - 1, sizes.channels), NAN, dtype=dtype),
        torch.full((NUM_SLOTS, *state_shape), NAN, dtype=dtype),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, dtype=torch.bool),
        pending=pending,
    )


class Piece(NamedTuple):
    """What one call computes for one sequence. Of a draft, `num_accepted` tokens turn out to be the sequence's own."""

    sequence: int
    start: int
    num_tokens: int
    is_draft: bool
    num_accepted: int


def make_schedule(seed: int, lengths: list[int], num_drafts: int) -> list[list[Piece]]:
    """Calls that bring every sequence to its length, one at a time or together, drafting or not."""
    choose = random.Random(seed)
    done = [0] * len(lengths)
    calls = []
    while open_ := [n for n in range(len(lengths)) if done[n] < lengths[n]]:
        call = []
        for n in choose.sample(open_, choose.randint(1, len(open_))):
            left = lengths[n] - done[n]
            is_draft = choose.random() < 0.7
            count = choose.randint(1, num_drafts) if is_draft else min(left, choose.choice([1, 1, 2, 7, 70]))
            accepted = min(left, choose.randint(0, count)) if is_draft else count
            call.append(Piece(n, done[n], count, is_draft, accepted))
            done[n] += accepted
        calls.append(call)
    return calls


def piece_inputs(streams: list[dict[str, Any]], call: list[Piece], rejected: float) -> dict[str, Any]:
    """Rows of the call's tokens. Not one number of a rejected one may be seen later."""
    parts: dict[str, list[Tensor]] = {"qkvz_TX": [], "ba_TY": []}
    for piece in call:
        for name, part in parts.items():
            own = streams[piece.sequence][name][piece.start : piece.start + piece.num_accepted]
            others = torch.full((piece.num_tokens - piece.num_accepted, own.shape[1]), rejected, dtype=own.dtype)
            part.append(torch.cat([own, others]))
    return {**streams[0], **{name: torch.cat(part) for name, part in parts.items()}}


def view(cache: DeltaCache, call: list[Piece], slots: list[int], started: set[int]) -> DeltaCache:
    fresh = [piece.sequence not in started for piece in call]
    return cache._replace(
        slots_N=torch.tensor([slots[piece.sequence] for piece in call]),
        is_fresh_N=torch.tensor(fresh),
        has_fresh=any(fresh),
        is_draft_N=torch.tensor([piece.is_draft for piece in call]) if any(p.is_draft for p in call) else None,
    )


def run_schedule(
    streams: list[dict[str, Any]],
    calls: list[list[Piece]],
    cache: DeltaCache,
    slots: list[int],
    op: Mixer,
    *,
    rejected: float = NAN,
) -> list[Tensor]:
    """Outputs of the accepted tokens, per sequence."""
    assert cache.pending is not None
    started: set[int] = set()
    outputs: list[list[Tensor]] = [[] for _ in streams]
    for call in calls:
        lengths = [piece.num_tokens for piece in call]
        out = run(piece_inputs(streams, call, rejected), lengths, view(cache, call, slots, started), op)
        for piece, part in zip(call, out.split(lengths), strict=True):
            outputs[piece.sequence].append(part[: piece.num_accepted])
            assert cache.pending.num_accepted[slots[piece.sequence]] == 0
            if piece.is_draft:
                cache.pending.num_accepted[slots[piece.sequence]] = piece.num_accepted
            started.add(piece.sequence)
    return [torch.cat(parts) for parts in outputs]


def make_streams(sizes: Sizes, lengths: list[int], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    inputs = make_inputs(sum(lengths), sizes, dtype=dtype)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return [rows(inputs, slice(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


def computed_alone(
    stream: dict[str, Any], sizes: Sizes, slot: int, op: Mixer, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, DeltaCache]:
    """The sequence in one call on a cache that knows no drafts."""
    cache = make_cache(sizes, 1, dtype)._replace(
        slots_N=torch.tensor([slot]), is_fresh_N=torch.tensor([True]), pending=None
    )
    return run(stream, [len(stream["qkvz_TX"])], cache, op), cache


@once
def exact_streams(sizes: Sizes, lengths: tuple[int, ...], slots: tuple[int, ...]) -> list[tuple[Tensor, DeltaCache]]:
    """The formula in fp64 on each sequence alone, once for all schedules and backends."""
    streams = make_streams(sizes, list(lengths), torch.float64)
    return [
        computed_alone(stream, sizes, slot, reference.gated_delta_mixer, torch.float64)
        for stream, slot in zip(streams, slots, strict=True)
    ]


def assert_schedules_change_no_bit(sizes: Sizes, num_drafts: int, lengths: list[int], seeds: range) -> None:
    slots = [5, 0, 7, 2, 4][: len(lengths)]
    streams = make_streams(sizes, lengths)
    wanted = [computed_alone(s, sizes, slot, ops.gated_delta_mixer) for s, slot in zip(streams, slots, strict=True)]
    for seed in seeds:
        cache = make_cache(sizes, num_drafts)
        calls = make_schedule(seed, lengths, num_drafts)
        outputs = run_schedule(streams, calls, cache, slots, ops.gated_delta_mixer)
        assert cache.pending is not None
        ops.apply_pending(cache.conv, cache.state, cache.pending, torch.tensor(slots))
        assert not cache.pending.num_accepted[slots].any()
        for n, slot in enumerate(slots):
            out, alone = wanted[n]
            assert torch.equal(outputs[n], out)
            assert torch.equal(cache.state[slot], alone.state[slot])
            assert torch.equal(cache.conv[slot], alone.conv[slot])
        others = [slot for slot in range(NUM_SLOTS) if slot not in slots]
        assert all(x[others].isnan().all() for x in (cache.conv, cache.state, *cache.pending[:-1]))
        assert (cache.pending.num_accepted[others] == -77).all()


NUMS_DRAFTS = (1, 2, 5)


@needs_native
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_drafts_change_no_bit(sizes: Sizes, isa: int) -> None:
    """Every two of sizes, instruction set and number of drafts."""
    num_drafts = NUMS_DRAFTS[(SIZES.index(sizes) + isa) % len(NUMS_DRAFTS)]
    assert_schedules_change_no_bit(sizes, num_drafts, [23, 90, 1, 14], range(6))


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("num_drafts", NUMS_DRAFTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_drafts_change_no_bit(sizes: Sizes, num_drafts: int, isa: int) -> None:
    assert_schedules_change_no_bit(sizes, num_drafts, [23, 90, 1, 14], range(6))


@needs_native
def test_drafts_of_released_sizes(isa: int) -> None:
    assert_schedules_change_no_bit(Sizes(16, 2, 128, 128, 4), 4, [13, 9], range(2))


@needs_native
def test_the_longest_drafts(isa: int) -> None:
    assert native is not None
    assert_schedules_change_no_bit(SIZES[0], native.MAX_DRAFT_TOKENS, [300, 150], range(2))


@needs_native
def test_drafts_on_any_number_of_threads(isa: int) -> None:
    assert native is not None
    try:
        for count in (2, 5):
            native.set_num_threads(count)
            assert_schedules_change_no_bit(SIZES[2], 3, [20, 31, 9], range(3))
    finally:
        native.set_num_threads(torch.get_num_threads())


@needs_native
@pytest.mark.parametrize("num_drafts", [1, 2, 3, 6])
def test_every_number_of_accepted_tokens(num_drafts: int, isa: int) -> None:
    """Two successive drafts for each pair of counts, then one token as usual: bits of outputs and states."""
    sizes = SIZES[3]
    (stream,) = make_streams(sizes, [2 * num_drafts + 1])
    for first in range(num_drafts + 1):
        for second in range(num_drafts + 1):
            calls = [
                [Piece(0, 0, num_drafts, True, first)],
                [Piece(0, first, num_drafts, True, second)],
                [Piece(0, first + second, 1, False, 1)],
            ]
            cache = make_cache(sizes, num_drafts)
            out = run_schedule([stream], calls, cache, [3], ops.gated_delta_mixer)[0]
            wanted, alone = computed_alone(rows(stream, slice(first + second + 1)), sizes, 3, ops.gated_delta_mixer)
            assert torch.equal(out, wanted)
            assert torch.equal(cache.state[3], alone.state[3])
            assert torch.equal(cache.conv[3], alone.conv[3])


@needs_native
def test_a_draft_leaves_the_state_alone(isa: int) -> None:
    """Until something is accepted, not one number of the carried states changes."""
    sizes = SIZES[0]
    (stream,) = make_streams(sizes, [9])
    cache = make_cache(sizes, 4)
    run_schedule([stream], [[Piece(0, 0, 5, False, 5)]], cache, [1], ops.gated_delta_mixer)
    before = cache.conv[1].clone(), cache.state[1].clone()
    drafting = view(cache, [Piece(0, 5, 4, True, 4)], [1], {0})
    first = run(rows(stream, slice(5, 9)), [4], drafting)
    assert torch.equal(cache.conv[1], before[0]) and torch.equal(cache.state[1], before[1])
    assert torch.equal(run(rows(stream, slice(5, 9)), [4], drafting), first)


@needs_native
def test_a_recorded_draft_reads_its_numbers_again(isa: int) -> None:
    """Slots, counts, which sequences draft: all of it may change between replays."""
    sizes, num_drafts, slots = SIZES[3], 3, [5, 0, 7, 2]
    lengths = [40] * len(slots)
    streams = make_streams(sizes, lengths)
    cache, other = make_cache(sizes, num_drafts), make_cache(sizes, num_drafts)
    start = [[Piece(n, 0, 2, False, 2) for n in range(len(slots))]]
    for each in (cache, other):
        run_schedule(streams, start, each, slots, ops.gated_delta_mixer)
    assert cache.pending is not None and other.pending is not None
    choose = random.Random(1)
    done = [2] * len(slots)
    place = piece_inputs(streams, [Piece(n, 0, 3, True, 3) for n in range(2)], NAN)
    fixed = view(cache, [Piece(n, 0, 3, True, 3) for n in range(2)], slots, {0, 1})
    assert fixed.is_draft_N is not None
    packing = Packing([3, 3])
    assert packing.cu_seqlens.shape == (3,)
    *rows_TX, weights = *list(place.values())[:2], DeltaWeights(*list(place.values())[2:])
    out_TZ, recording = torch.empty(0), None
    for _ in range(12):
        call = []
        for n in choose.sample(range(len(slots)), 2):
            is_draft = choose.random() < 0.7
            call.append(Piece(n, done[n], 3, is_draft, choose.randint(0, 3) if is_draft else 3))
        inputs, now = piece_inputs(streams, call, NAN), view(cache, call, slots, {0, 1, 2, 3})
        place["qkvz_TX"].copy_(inputs["qkvz_TX"])
        place["ba_TY"].copy_(inputs["ba_TY"])
        fixed.slots_N.copy_(now.slots_N)
        fixed.is_draft_N.copy_(torch.tensor([piece.is_draft for piece in call]))
        if recording is None:
            out_TZ, recording = ops.record(
                lambda: ops.gated_delta_mixer(*rows_TX, weights, packing=packing, cache=fixed), torch.device("cpu")
            )
            assert recording is not None
        else:
            recording.replay()
        wanted = run(inputs, [3, 3], view(other, call, slots, {0, 1, 2, 3}))
        for n, piece in enumerate(call):
            mine = slice(3 * n, 3 * n + piece.num_accepted)
            assert torch.equal(out_TZ[mine], wanted[mine])
            assert not out_TZ[mine].isnan().any()
            for each in (cache, other):
                assert each.pending is not None
                each.pending.num_accepted[slots[piece.sequence]] = piece.num_accepted if piece.is_draft else 0
            done[piece.sequence] += piece.num_accepted
    assert torch.equal(cache.state[slots], other.state[slots])
    assert torch.equal(cache.conv[slots], other.conv[slots])


@pytest.mark.parametrize("backend", [pytorch, reference])
@pytest.mark.parametrize("sizes", [*SIZES[:3], SIZES[4], Sizes(2, 3, 8, 12, 4)], ids=str)
def test_torch_and_the_reference_keep_drafts_apart(sizes: Sizes, backend: ModuleType) -> None:
    """In fp64 by schedules of drafts as by one call. Chunks mix tokens with zero weight, so nothing is NaN here."""
    lengths, slots, num_drafts = [23, 90, 1, 14], [5, 0, 7, 2], 3
    streams = make_streams(sizes, lengths, torch.float64)
    wanted = exact_streams(sizes, tuple(lengths), tuple(slots))
    for seed in range(4):
        cache = make_cache(sizes, num_drafts, torch.float64)
        calls = make_schedule(seed, lengths, num_drafts)
        outputs = run_schedule(streams, calls, cache, slots, backend.gated_delta_mixer, rejected=3.0)
        assert cache.pending is not None
        backend.apply_pending(cache.conv, cache.state, cache.pending, torch.tensor(slots))
        assert not cache.pending.num_accepted[slots].any()
        for n, slot in enumerate(slots):
            out, alone = wanted[n]
            assert_close(outputs[n], out, tolerance=1e-10)
            assert_close(cache.state[slot], alone.state[slot], tolerance=1e-10, name="state")
            assert torch.equal(cache.conv[slot], alone.conv[slot])


@needs_native
@pytest.mark.parametrize("order", [1, -1])
def test_drafts_mean_the_same_in_every_backend(order: int, isa: int) -> None:
    """What a draft keeps has one meaning: one implementation may compute and the other apply it."""
    sizes, lengths, slots, num_drafts = SIZES[0], [30, 12], [4, 1], 3
    streams = make_streams(sizes, lengths)
    ops_in_turn = cycle([x.gated_delta_mixer for x in (ops, reference, pytorch)][::order])
    cache = make_cache(sizes, num_drafts)
    calls = make_schedule(order, lengths, num_drafts)
    outputs = run_schedule(
        streams, calls, cache, slots, lambda *rows, **call: next(ops_in_turn)(*rows, **call), rejected=3.0
    )
    for n, slot in enumerate(slots):
        wanted, _ = computed_alone(streams[n], sizes, slot, reference.gated_delta_mixer)
        assert_close(outputs[n], wanted, tolerance=2 * TOLERANCE)


def accepting(cache: DeltaCache, slot: int, count: int) -> DeltaCache:
    assert cache.pending is not None
    cache.pending.num_accepted[slot] = count
    return cache


@pytest.mark.parametrize("backend", [ops, pytorch, reference])
@torch.inference_mode()
def test_a_draft_that_does_not_fit_is_refused(backend: ModuleType) -> None:
    op = backend.gated_delta_mixer
    sizes = SIZES[0]
    (stream,) = make_streams(sizes, [9])
    cache = make_cache(sizes, 3)
    run_schedule([stream], [[Piece(0, 0, 5, False, 5)]], cache, [1], op)
    before = cache.state[1].clone()
    with pytest.raises(ValueError, match="at most 3"):
        run(rows(stream, slice(5, 9)), [4], view(cache, [Piece(0, 5, 4, True, 4)], [1], {0}), op)
    assert torch.equal(cache.state[1], before)


@needs_native
def test_counts_out_of_range_are_refused(isa: int) -> None:
    sizes = SIZES[0]
    (stream,) = make_streams(sizes, [9])
    cache = make_cache(sizes, 3)
    run_schedule([stream], [[Piece(0, 0, 5, False, 5)]], cache, [1], ops.gated_delta_mixer)
    assert cache.pending is not None
    before = cache.state[1].clone()
    for count in (-1, 4):
        wrong = view(accepting(cache, 1, count), [Piece(0, 5, 1, False, 1)], [1], {0})
        with pytest.raises(IndexError, match=str(count)):
            run(rows(stream, slice(5, 6)), [1], wrong)
        with pytest.raises(IndexError, match=str(count)):
            ops.apply_pending(cache.conv, cache.state, cache.pending, torch.tensor([1]))
    with pytest.raises(IndexError, match="9"):
        ops.apply_pending(cache.conv, cache.state, cache.pending, torch.tensor([9]))
    assert torch.equal(cache.state[1], before)


@pytest.mark.parametrize("backend", [ops, pytorch])
def test_pending_tokens_of_other_sizes_are_refused(backend: ModuleType) -> None:
    op = backend.gated_delta_mixer
    (stream,) = make_streams(SIZES[0], [2])
    cache = make_cache(SIZES[0], 3)._replace(pending=make_cache(SIZES[3], 3).pending)
    with torch.inference_mode(), pytest.raises(ValueError, match="pending"):
        run(stream, [2], view(cache, [Piece(0, 0, 2, True, 2)], [1], set()), op)
    cache = make_cache(SIZES[0], 3)._replace(pending=None)
    with torch.inference_mode(), pytest.raises(ValueError, match="pending"):
        run(stream, [2], view(cache, [Piece(0, 0, 2, True, 2)], [1], set()), op)
