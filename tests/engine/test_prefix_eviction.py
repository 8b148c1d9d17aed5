"""Which cached prefix goes first, what of each owner stays, and what the bookkeeping of a large cache costs."""

from __future__ import annotations

import functools
import random
from collections import Counter

import pytest

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.prefix import Hit, PrefixCache
from tests.engine.prefix_traffic import (
    BLOCK,
    MODES,
    Tokens,
    check,
    keep,
    make_cache,
    make_room,
    num_hit,
    use,
)
from tests.pace import growth


class NaiveBenefit:
    """The documented formula, written with plain powers over all uses of each checkpoint."""

    def __init__(self, half_life: int) -> None:
        self.half_life = half_life
        self.uses: dict[Tokens, list[tuple[int, float]]] = {}
        self.num_hits: Counter[Tokens] = Counter()
        self.now = 0

    def above(self, tokens: Tokens) -> Tokens:
        return max((t for t in self.uses if len(t) < len(tokens) and tokens[: len(t)] == t), key=len, default=())

    def weight(self, tokens: Tokens) -> float:
        return sum(count * 2.0 ** ((t - self.now) / self.half_life) for t, count in self.uses[tokens])

    def benefit(self, tokens: Tokens) -> float:
        return (len(tokens) - len(self.above(tokens))) * self.weight(tokens)

    def is_lowest(self, tokens: Tokens) -> bool:
        return not any(self.above(other) == tokens for other in self.uses)

    def hit(self, tokens: Tokens) -> None:
        self.uses[tokens] = [*self.uses[tokens], (self.now, 1.0)] if self.num_hits[tokens] else [(self.now, 1 / 8)]
        self.num_hits[tokens] += 1

    def remove(self, tokens: Tokens) -> None:
        above = self.above(tokens)
        if above:
            self.uses[above] += self.uses[tokens]
        del self.uses[tokens], self.num_hits[tokens]


@pytest.mark.parametrize("seed", range(20))
def test_eviction_follows_the_documented_benefit(seed: int) -> None:
    rng = random.Random(seed)
    cache = make_cache(num_blocks=400, num_slots=30, half_life=rng.randint(2, 30))
    assert cache.slots is not None
    naive = NaiveBenefit(cache.half_life)
    slot_of: dict[Tokens, int] = {}
    for _ in range(300):
        start = rng.choice([(), *naive.uses])
        tokens = (*start[: rng.randint(0, len(start))], *(rng.randint(0, 2) for _ in range(rng.randint(1, 9))))[:40]
        action = rng.random()
        if action < 0.45 and cache.slots.num_free and tokens not in naive.uses:
            is_shared = rng.random() < 0.2
            slot_of[tokens] = keep(cache, tokens, is_shared=is_shared)
            naive.uses[tokens], naive.num_hits[tokens] = [(naive.now, 1.0)], int(is_shared)
        elif action < 0.8:
            found = naive.above((*tokens, -1))
            naive.now += 1
            assert use(cache, (*tokens, -1)).num_tokens == len(found)
            if found:
                naive.hit(found)
        elif naive.uses:
            wants_slot = rng.random() < 0.5
            if wants_slot:
                scores = {t: naive.benefit(t) for t in naive.uses}
            else:
                scores = {t: naive.weight(t) for t in naive.uses if naive.is_lowest(t)}
            evicted = cache.evict(num_slots=1) if wants_slot else cache.evict(num_blocks=1)
            (gone,) = (t for t in naive.uses if slot_of[t] == evicted.slots[0])
            assert len(evicted.slots) == 1 and scores[gone] <= min(scores.values()) * (1 + 1e-9)
            naive.remove(gone)
        check(cache)


@pytest.mark.parametrize("seed", range(5))
def test_without_states_the_coldest_leaf_goes(seed: int) -> None:
    rng = random.Random(seed)
    cache = make_cache("attention only", num_blocks=300, half_life=5)
    uses: dict[Tokens, list[int]] = {}
    for now in range(1, 200):
        tokens = tuple(rng.randint(0, 1) for _ in range(BLOCK) for _ in range(rng.randint(1, 3)))
        tokens = tuple(tokens[: len(tokens) // BLOCK * BLOCK])
        prefixes = [tokens[:end] for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        assert use(cache, (*tokens, 9)).num_tokens == BLOCK * sum(p in uses for p in prefixes)
        for p in prefixes:
            uses.setdefault(p, []).append(now)
        keep(cache, tokens)
        while len(uses) > 12:
            leaves = [p for p in uses if not any(len(q) > len(p) and q[: len(p)] == p for q in uses)]
            heat = {p: sum(2.0 ** (t / cache.half_life) for t in uses[p]) for p in leaves}
            assert len(cache.evict(num_blocks=1).blocks) == 1
            (gone,) = (p for p in uses if num_hit(cache, p) < len(p))
            assert gone in leaves and heat[gone] <= min(heat.values()) * (1 + 1e-9)
            del uses[gone]
        check(cache)


def test_a_shared_prompt_outlives_a_flood_of_prompts_that_never_return() -> None:
    cache = make_cache(num_blocks=200, num_slots=6, half_life=64)
    assert cache.slots is not None
    system = tuple(range(40))
    keep(cache, system, is_shared=True)
    for i in range(60):
        if i % 10 == 0:
            assert use(cache, (*system, 100 + i)).num_tokens == 40
        if not cache.slots.num_free:
            cache.evict(num_slots=1)
        use(cache, tuple(range(1000 * i + 1000, 1000 * i + 1041)))
        keep(cache, tuple(range(1000 * i + 1000, 1000 * i + 1040)))
    assert num_hit(cache, system) == 40


@pytest.mark.parametrize("mode", MODES)
def test_a_flood_of_salts_takes_nothing_within_anothers_share(mode: str) -> None:
    """One owner uses all that there is, with a salt for each prompt. Another has a third of it and asks for nothing."""
    cache = make_cache(mode, num_blocks=90, num_slots=30)
    mine = [tuple(range(n, n + 12)) for n in range(0, 1000, 100)]
    for tokens in mine:
        keep(cache, tokens, salt="mine", owner="b")
    for n in range(1000):
        make_room(cache, 3, "a")
        keep(cache, tuple(range(n, n + 12)), salt=f"salt-{n}", owner="a")
        if n % 100 == 0:
            check(cache)
    assert all(num_hit(cache, tokens, salt="mine") == 12 for tokens in mine)
    assert [num_hit(cache, tuple(range(n, n + 12)), salt=f"salt-{n}") for n in range(970, 1000)] == [0] * 10 + [12] * 20


@pytest.mark.parametrize("mode", MODES)
def test_one_owner_may_use_all_and_gives_half_of_it_to_the_second(mode: str) -> None:
    cache = make_cache(mode, num_blocks=90, num_slots=30)
    prompts = [tuple(range(n, n + 12)) for n in range(0, 6000, 100)]
    for tokens in prompts:
        make_room(cache, 3, "a")
        keep(cache, tokens, salt="a", owner="a")
    assert sum(num_hit(cache, tokens, salt="a") == 12 for tokens in prompts) == 30
    for tokens in prompts:
        make_room(cache, 3, "b")
        keep(cache, tokens, salt="b", owner="b")
    check(cache)
    for owner in "ab":
        assert [num_hit(cache, tokens, salt=owner) == 12 for tokens in prompts[-15:]] == [True] * 15
        assert sum(num_hit(cache, tokens, salt=owner) == 12 for tokens in prompts) == 15


def test_with_more_owners_than_there_are_slots_the_oldest_goes() -> None:
    cache = make_cache("states only", num_slots=3)
    for owner in "abcdef":
        make_room(cache, 0, owner)
        keep(cache, tuple(range(12)), salt=owner, owner=owner)
    assert [num_hit(cache, tuple(range(12)), salt=owner) for owner in "abcdef"] == [0, 0, 0, 12, 12, 12]


def test_what_is_held_of_a_greedy_owner_stays_and_nobody_within_its_share_makes_room() -> None:
    cache = make_cache(num_blocks=10, num_slots=4)
    for n in (100, 200, 300):
        keep(cache, tuple(range(n, n + 8)), salt="greedy", owner="a")
    keep(cache, tuple(range(8)), salt="other", owner="b")
    hits = [cache.acquire(tuple(range(n, n + 9)), salt="greedy", limit=8) for n in (100, 200, 300)]
    assert cache.evict(num_blocks=3, num_slots=1, owner="a") == ([], [])
    assert num_hit(cache, tuple(range(8)), salt="other") == 8
    evicted = cache.evict(num_slots=1, owner="a", exposed=["c", "b"])
    assert len(evicted.slots) == 1 and num_hit(cache, tuple(range(8)), salt="other") == 0
    for hit in hits:
        cache.release(hit)
    check(cache)
    evicted = cache.evict(num_slots=3, num_blocks=1, owner="c", exposed=None)
    assert len(evicted.slots) == 3 and cache.num_checkpoints == 0


def test_no_call_takes_longer_the_more_is_cached() -> None:
    """Of ten times as many blocks and states; a walk over all of either would take ten times as long."""

    def filled(count: int) -> tuple[PrefixCache, list[Tokens]]:
        cache = make_cache(num_blocks=102 * count, num_slots=count + 1)
        prompts = [tuple(range(1000 * n, 1000 * n + 400)) for n in range(count)]
        for tokens in prompts:
            keep(cache, tokens)
        assert len(set(cache.owned_blocks())) == 100 * count and cache.num_checkpoints == count
        return cache, prompts

    def work(cache: PrefixCache, prompts: list[Tokens]) -> None:
        for _ in range(8):
            tokens, other = prompts.pop(0), prompts.pop()
            assert len(cache.evict(num_slots=1).slots) == 1
            assert cache.evict(num_blocks=1).blocks
            use(cache, (*other, 1))
            keep(cache, other[:201])
            keep(cache, (*tokens, -1))

    small, large = filled(100), filled(1000)
    assert growth(lambda: work(*small), lambda: work(*large)) < 3


def test_of_a_conversation_the_newest_state_stays() -> None:
    """Each turn hits the state that the last one left, and leaves another; the old ones are of little use."""
    cache = make_cache(num_blocks=200, num_slots=3)
    assert cache.slots is not None
    turns = [tuple(range(20 * n)) for n in range(1, 10)]
    for last, turn in zip([(), *turns], turns, strict=False):
        assert use(cache, (*turn, -1)).num_tokens == len(last)
        if not cache.slots.num_free:
            cache.evict(num_slots=1)
        keep(cache, turn)


def test_a_block_is_shared_by_its_node_and_by_states_within_it() -> None:
    """A request stops twice in its second block and goes on: one block serves both states and the full node."""
    cache = make_cache(num_blocks=2, num_slots=3)
    assert cache.blocks is not None and cache.slots is not None
    own, slots = cache.blocks.allocate(2), cache.slots.allocate(3)
    tokens = tuple(range(8))
    for slot, end in zip(slots, (5, 7, 8), strict=True):
        cache.add_checkpoint(tokens[:end], own, salt="", slot=slot)
    check(cache, own, slots)
    assert cache.evict(num_blocks=1) == ([], []), "the request holds all of it"
    cache.blocks.free(own)
    cache.slots.free(slots)
    for end in (5, 7):
        assert cache.lookup((*tokens[:end], 99), salt="", limit=end) == (end, (own[0],), own[1], slots[(end - 5) // 2])
    evicted = cache.evict(num_blocks=2)
    assert sorted(evicted.blocks) == sorted(own) and sorted(evicted.slots) == sorted(slots)
    check(cache)


def test_a_state_that_is_there_already_is_not_taken_twice() -> None:
    cache = make_cache()
    assert cache.slots is not None
    first = keep(cache, tuple(range(6)))
    second = keep(cache, tuple(range(6)))
    assert first != second and cache.num_checkpoints == 1 and cache.statistics.num_checkpoints_made == 1
    assert cache.slots.num_owners(second) == 0
    check(cache)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_of_a_quarter_million_tokens(mode: str) -> None:
    """Ten times as many tokens take about ten times as long, where a walk that is not linear would take a hundred."""
    cache = make_cache(mode, block_size=16, num_blocks=2 * 18_432)
    prompts = [tuple(i * 7919 % 150_000 + salt for i in range(262_144 // part)) for salt, part in ((1, 10), (0, 1))]
    for prompt in prompts:
        keep(cache, prompt[:-1])

    def look(prompt: Tokens) -> Hit:
        return cache.lookup(prompt, salt="", limit=len(prompt) - 1)

    def wait(prompt: Tokens) -> None:
        flight = cache.announce(prompt, salt="", hit=cache.acquire(prompt, salt="", limit=len(prompt) - 1))
        cache.wait((*prompt[:-5], 1, 2), salt="", limit=len(prompt) - 4)
        cache.land(flight)

    assert look(prompts[1]).num_tokens == (262_128 if mode == "attention only" else 262_143)
    for work in (look, wait):
        assert growth(functools.partial(work, prompts[0]), functools.partial(work, prompts[1])) < 30


@pytest.mark.parametrize("spoil", ["share", "slot", "above", "depth", "node"])
def test_the_check_notices_wrong_bookkeeping(spoil: str) -> None:
    cache = make_cache()
    assert cache.blocks is not None and cache.slots is not None
    keep(cache, tuple(range(6)))
    keep(cache, tuple(range(12)))
    check(cache)
    path = cache._trie.walk(tuple(range(12)), salt="", limit=12)
    (checkpoint,) = path[-1].checkpoints.values()
    if spoil == "share":
        cache.blocks.share([path[1].block or 0])
    elif spoil == "slot":
        cache.slots.free([checkpoint.slot])
    elif spoil == "above":
        checkpoint.above = None
    elif spoil == "depth":
        path[-1].depth += 1
    else:
        del path[1].children[path[2].key]
    with pytest.raises(AssertionError):
        check(cache)


def test_a_pool_with_several_owners() -> None:
    pool = RefPool(3, name="block")
    a, b = pool.allocate(2)
    pool.share([a, a])
    assert pool.num_owners(a) == 3 and pool.num_owners(b) == 1 and pool.num_owners(2) == 0
    pool.check_integrity([a, b, a, a])
    for owned in ([a, b], [a, a, b], [a, a, a], [a, a, a, b, 2]):
        with pytest.raises(AssertionError):
            pool.check_integrity(owned)
    pool.free([a, a])
    assert pool.drain_freed() == () and pool.num_free == 1
    pool.free([a])
    assert pool.drain_freed() == (a,) and pool.num_free == 2
    for wrong in (pool.free, pool.share):
        with pytest.raises(AssertionError):
            wrong([a])
    assert pool.allocate(2) == [2, a]
    with pytest.raises(AssertionError):
        pool.allocate(1)
