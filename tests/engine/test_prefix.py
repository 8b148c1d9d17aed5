"""Cached prefixes: exactly the tokens that were computed, nobody else's; nothing lost, doubled or taken from use."""

from __future__ import annotations

import itertools

import pytest

from tests.engine.prefix_traffic import (
    BLOCK,
    MODES,
    Traffic,
    check,
    keep,
    make_cache,
    num_hit,
    use,
)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_random_traffic(mode: str, seed: int) -> None:
    """Hundreds of requests that meet, part, wait, abort and evict; everything is checked after every operation."""
    traffic = Traffic(mode, seed)
    while len(traffic.history) < 300 or traffic.running or traffic.waiting:
        while len(traffic.history) < 300 and len(traffic.waiting) < 4 and traffic.rng.random() < 0.6:
            traffic.new_request()
        if traffic.history:
            traffic.step()
    assert min(traffic.seen[name] for name in ("hit", "miss", "evicted", "waited")) > 0, traffic.seen
    assert (traffic.seen["partial hit"] > 0) == (mode != "attention only")
    cache = traffic.cache
    assert cache.statistics.num_requests == 300 and 0 < cache.statistics.tokens_hit < cache.statistics.tokens_looked_up
    traffic.evict(len(set(cache.owned_blocks())), cache.num_checkpoints)
    assert not list(cache.owned_blocks()) and not cache.num_checkpoints, "nothing is held, so all must go"
    for pool in (cache.blocks, cache.slots):
        assert pool is None or pool.num_used == 0


@pytest.mark.parametrize("mode", MODES)
def test_every_token_and_every_place_counts(mode: str) -> None:
    cache = make_cache(mode)
    blocks = [tuple(range(10 * i, 10 * i + BLOCK)) for i in range(3)]
    tokens = (*blocks[0], *blocks[1], *blocks[2])
    ends = (0, 4, 8, 12) if mode == "attention only" else (0, 2, 4, 7, 8, 11, 12)
    for end in ends[1:]:
        keep(cache, tokens[:end])
    for place in range(len(tokens)):
        changed = (*tokens[:place], 99, *tokens[place + 1 :])
        assert num_hit(cache, changed) == max(end for end in ends if end <= place)
    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2):
            moved = tuple(token for i in order for token in blocks[i])
            assert num_hit(cache, moved) == (4 if order[0] == 0 else 0)
    for limit in range(len(tokens) + 1):
        assert cache.lookup(tokens, salt="", limit=limit).num_tokens == max(end for end in ends if end <= limit)
    assert num_hit(cache, tokens, salt="other") == 0
    check(cache)


def test_the_same_prompt_again_is_a_hit() -> None:
    """A prompt's last token is always computed anew, so the state before it is what a repetition needs."""
    cache = make_cache(min_tokens=64, block_size=16)
    prompt = tuple(range(527))
    flight = cache.announce(prompt, salt="", hit=cache.acquire(prompt, salt="", limit=526))
    assert flight.next_stop == 526
    keep(cache, prompt[:526])
    assert cache.lookup(prompt, salt="", limit=526).num_tokens == 526
    assert cache.lookup((*prompt, 1, 2, 3), salt="", limit=529).num_tokens == 526


def test_stops_lie_on_the_grid_and_not_too_close() -> None:
    cache = make_cache(grid=8, min_tokens=10, num_blocks=100)
    prompt = tuple(range(100))
    miss = cache.acquire(prompt, salt="", limit=99)
    assert cache.announce(prompt, salt="", hit=miss, stops=[5, 50, 400]).stops == {48: False, 96: False}
    keep(cache, prompt[:90])
    hit = cache.acquire((*prompt[:90], *range(200, 220)), salt="", limit=109)
    flight = cache.announce((*prompt[:90], *range(200, 220)), salt="", hit=hit)
    assert hit.num_tokens == 90 and flight.stops == {104: False}, "the branch at 90 has a state already"


@pytest.mark.parametrize("salt", ["", "other"])
def test_a_later_request_waits_for_the_one_ahead_which_stops_where_they_part(salt: str) -> None:
    cache = make_cache()
    system = tuple(range(30))
    first, second = (*system, 50, 51, 52), (*system, 60, 61)
    flight = cache.announce(first, salt="", hit=cache.acquire(first, salt="", limit=32))
    flight.num_planned = 10
    wait = cache.wait(second, salt=salt, limit=31)
    if salt:
        assert wait is None and flight.next_stop == 32 and cache.branch_point(second, salt=salt) == 0
        return
    assert wait == (flight, 30) and wait.is_open and flight.next_stop == 30
    assert cache.branch_point(second, salt="") == 30
    flight.num_computed, flight.num_planned = 10, 30
    assert wait.is_open and cache.wait(second, salt="", limit=31) == wait, "it is planned to get there"
    assert cache.wait((*system[:20], 9, 9), salt="", limit=21) is None, "its state there cannot be caught any more"
    flight.num_computed = 30
    assert flight.is_at_stop and flight.stops[30] and not wait.is_open
    keep(cache, system, is_shared=True)
    assert cache.wait(second, salt="", limit=31) is None
    assert cache.lookup(second, salt="", limit=31).num_tokens == 30


def test_nobody_waits_for_what_ended_or_brings_too_little() -> None:
    cache = make_cache(min_tokens=8)
    tokens = tuple(range(40))
    flight = cache.announce(tokens, salt="", hit=cache.acquire(tokens, salt="", limit=39))
    assert cache.wait((*tokens[:7], 99, 99), salt="", limit=8) is None
    wait = cache.wait((*tokens[:8], 99, 99), salt="", limit=9)
    assert wait is not None and wait.num_tokens == 8
    cache.land(flight)
    assert not wait.is_open and cache.wait((*tokens[:8], 99, 99), salt="", limit=9) is None


def test_without_states_one_may_wait_for_any_block() -> None:
    cache = make_cache("attention only")
    tokens = tuple(range(40))
    flight = cache.announce(tokens, salt="", hit=cache.acquire(tokens, salt="", limit=39))
    flight.num_planned = flight.num_computed = 16
    keep(cache, tokens[:16])
    assert not flight.stops
    assert cache.wait((*tokens[:19], 99, 99), salt="", limit=20) is None, "all that helps is there"
    assert cache.wait((*tokens[:23], 99, 99), salt="", limit=24) == (flight, 20)
    assert flight.next_stop is None


def test_the_third_request_finds_what_the_first_two_had_in_common() -> None:
    """The first left no state where they part; the second, which computes that anyhow, leaves one."""
    cache = make_cache()
    system = tuple(range(22))
    keep(cache, (*system, 50, 51, 52))
    second, third = (*system, 60, 61), (*system, 70)
    hit = cache.acquire(second, salt="", limit=23)
    flight = cache.announce(second, salt="", hit=hit)
    assert hit.num_tokens == 0 and flight.next_stop == 22 and flight.stops[22]
    cache.land(flight)
    keep(cache, system, is_shared=True)
    assert cache.lookup(third, salt="", limit=22).num_tokens == 22
    check(cache)


def test_pinned_things_stay_and_nothing_goes_in_vain() -> None:
    cache = make_cache(num_blocks=9, num_slots=3)
    assert cache.blocks is not None and cache.slots is not None
    keep(cache, tuple(range(10)))  # three blocks
    keep(cache, tuple(range(50, 62)))  # three others
    hit = cache.acquire(tuple(range(11)), salt="", limit=10)
    held = [*hit.blocks, hit.tail_block]
    assert cache.evict(num_blocks=4) == cache.evict(num_slots=2) == ([], [])
    assert cache.num_checkpoints == 2, "what cannot succeed must not empty the cache"
    evicted = cache.evict(num_blocks=3, num_slots=1)
    assert len(evicted.blocks) == 3 and len(evicted.slots) == 1 and not set(evicted.blocks) & set(held)
    cache.release_sources(hit)
    assert cache.evict(num_blocks=1) == ([hit.tail_block], [hit.slot]), "only the full blocks are still in use"
    check(cache, list(hit.blocks))
    assert cache.evict(num_blocks=1) == ([], [])
    cache.blocks.free(hit.blocks)
    assert sorted(cache.evict(num_blocks=2).blocks) == sorted(hit.blocks)
    check(cache)


def test_a_state_in_the_middle_goes_without_its_blocks() -> None:
    cache = make_cache()
    upper, lower = keep(cache, tuple(range(8))), keep(cache, tuple(range(16)))
    for _ in range(3):
        use(cache, tuple(range(17)))
    assert cache.evict(num_slots=1) == ([], [upper])
    assert num_hit(cache, tuple(range(16))) == 16 and num_hit(cache, tuple(range(12))) == 0
    evicted = cache.evict(num_slots=1)
    assert evicted.slots == [lower] and len(evicted.blocks) == 4
    check(cache)
