"""Cached prefixes: exactly the tokens that were computed, nobody else's; nothing lost, doubled or taken from use."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.flights import Flight, Wait
from qnext.engine.policy.prefix import Hit, PrefixCache
from tests.pace import growth

BLOCK = 4
Tokens = tuple[int, ...]
Content = tuple[str, Tokens]  # whose tokens, and all of them up to the one whose keys and values these are

MODES = {"hybrid": (True, True), "attention only": (False, True), "states only": (True, False)}


def make_cache(mode: str = "hybrid", *, num_blocks: int = 64, num_slots: int = 8, **changes: float) -> PrefixCache:
    has_states, has_blocks = MODES[mode]
    values = {"block_size": BLOCK, "min_tokens": 1, **changes}
    return PrefixCache(
        blocks=RefPool(num_blocks, name="block") if has_blocks else None,
        slots=RefPool(num_slots, name="slot") if has_states else None,
        **values,
    )


def make_room(cache: PrefixCache, num_blocks: int, owner: str) -> None:
    """As a scheduler does before an owner computes so many blocks."""
    for pool, count in ((cache.blocks, num_blocks), (cache.slots, 1)):
        if pool is not None and count > pool.num_free:
            pool.holdings.add(owner, count)
            wanted = {"num_blocks" if pool is cache.blocks else "num_slots": count - pool.num_free}
            cache.evict(owner=owner, **wanted)
            pool.holdings.add(owner, -count)
            assert count <= pool.num_free


def keep(cache: PrefixCache, tokens: Tokens, *, salt: str = "", owner: str = "", is_shared: bool = False) -> int:
    """As if a request had computed just these tokens and ended; returns the slot of the checkpoint."""
    own = cache.blocks.allocate(-(-len(tokens) // cache.block_size), owner) if cache.blocks else []
    slot = -1
    if cache.slots is None:
        cache.insert(tokens, own, salt=salt, owner=owner)
    else:
        (slot,) = cache.slots.allocate(1, owner)
        cache.add_checkpoint(tokens, own, salt=salt, owner=owner, slot=slot, is_shared=is_shared)
        cache.slots.free([slot])
    if cache.blocks:
        cache.blocks.free(own)
    return slot


def use(cache: PrefixCache, tokens: Tokens, *, salt: str = "") -> Hit:
    """As if a request with this prompt had been admitted and aborted."""
    hit = cache.acquire(tokens, salt=salt, limit=len(tokens) - 1)
    cache.land(cache.announce(tokens, salt=salt, hit=hit))
    cache.release(hit)
    return hit


def num_hit(cache: PrefixCache, tokens: Tokens, *, salt: str = "") -> int:
    return cache.lookup(tokens, salt=salt, limit=len(tokens)).num_tokens


def check(cache: PrefixCache, blocks: list[int] | None = None, slots: list[int] | None = None) -> None:
    """No id has an owner too many or too few, if others hold `blocks` and `slots`."""
    cache.check_integrity()
    if cache.blocks is not None:
        cache.blocks.check_integrity([*cache.owned_blocks(), *(blocks or [])])
    if cache.slots is not None:
        cache.slots.check_integrity([*cache.owned_slots(), *(slots or [])])


@dataclass(eq=False)
class Running:
    tokens: Tokens  # prompt and all of the answer, known beforehand only to the test
    num_prompt: int
    salt: str
    will_abort: bool
    flight: Flight | None = None
    hit: Hit | None = None  # its sources are still to be released
    blocks: list[int] = field(default_factory=list)
    slot: int | None = None
    num_computed: int = 0
    num_planned: int = 0
    copy_slot: int | None = None
    wait: Wait | None = None


class Traffic:
    """A small scheduler that does what the docstring asks for, above a memory that knows what lies where."""

    def __init__(self, mode: str, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.cache = make_cache(
            mode,
            num_blocks=rng.randint(16, 50),
            num_slots=rng.randint(2, 9),
            half_life=20,
        )
        self.cache.grid = rng.choice([1, 1, 2, 3, 8])
        self.blocks, self.slots = self.cache.blocks, self.cache.slots
        self.kv: dict[tuple[int, int], Content] = {}
        self.state: dict[int, Content] = {}
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.naive: dict[Content, int] = {}  # usable prefix -> its slot, or its last block where there are no states
        self.history: list[tuple[str, Tokens]] = []
        self.seen: Counter[str] = Counter()

    def new_request(self) -> None:
        """Half of the prompts go on from an earlier one, cut anywhere; two token ids make the others meet too."""
        rng = self.rng
        salt, start = rng.choice("ab"), ()
        if self.history and rng.random() < 0.6:
            salt, start = rng.choice(self.history[-20:])
            start = start[: rng.choice([len(start), rng.randint(0, len(start))])]
        prompt = (*start, *(rng.randint(0, 1) for _ in range(rng.randint(1, 12))))[:48]
        tokens = (*prompt, *(rng.randint(0, 1) for _ in range(rng.randint(0, 9))))
        self.history.append((salt, tokens))
        self.waiting.append(Running(tokens, len(prompt), salt, will_abort=rng.random() < 0.15))

    def held(self) -> tuple[list[int], list[int]]:
        """All that requests own."""
        blocks, slots = [], []
        for request in self.running:
            blocks += request.blocks
            slots += [s for s in (request.slot, request.copy_slot) if s is not None]
            if request.hit is not None:
                blocks += [] if request.hit.tail_block is None else [request.hit.tail_block]
                slots += [] if request.hit.slot is None else [request.hit.slot]
        return blocks, slots

    def check(self) -> None:
        check(self.cache, *self.held())
        for _ in range(2):
            salt, tokens = self.rng.choice(self.history)
            tokens = (*tokens[: self.rng.randint(0, len(tokens))], self.rng.randint(0, 1), self.rng.randint(0, 1))
            self.check_hit(tokens, salt, self.rng.randint(0, len(tokens)))

    def check_hit(self, tokens: Tokens, salt: str, limit: int) -> None:
        """Exactly the longest prefix that the naive model holds, and in memory exactly its content."""
        hit = self.cache.lookup(tokens, salt=salt, limit=limit)
        usable = [n for n in range(limit + 1) if n == 0 or (salt, tokens[:n]) in self.naive]
        if self.slots is None:
            usable = list(itertools.takewhile(lambda n: n in usable, range(0, limit + 1, BLOCK)))
        assert hit.num_tokens == max(usable)
        if self.blocks is not None:
            pages = [*hit.blocks, *([] if hit.tail_block is None else [hit.tail_block])]
            assert len(pages) == -(-hit.num_tokens // BLOCK) and len(hit.blocks) == hit.num_tokens // BLOCK
            for i in range(hit.num_tokens):
                assert self.kv[pages[i // BLOCK], i % BLOCK] == (salt, tokens[: i + 1])
        if hit.num_tokens and self.slots is not None:
            assert hit.slot is not None and self.state[hit.slot] == (salt, tokens[: hit.num_tokens])
        self.seen["partial hit"] += bool(hit.num_tokens % BLOCK)
        self.seen["miss"] += not hit.num_tokens

    def evict(self, num_blocks: int, num_slots: int) -> None:
        blocks, slots = self.held()
        evicted = self.cache.evict(num_blocks=num_blocks, num_slots=num_slots)
        assert not set(evicted.blocks) & set(blocks) and not set(evicted.slots) & set(slots)
        gone = evicted.blocks if self.slots is None else evicted.slots
        self.naive = {key: index for key, index in self.naive.items() if index not in gone}
        self.seen["evicted"] += bool(evicted.blocks or evicted.slots)
        self.check()

    def admit(self, request: Running) -> bool:
        if request.wait is None or not request.wait.is_open:
            prompt = request.tokens[: request.num_prompt]
            request.wait = self.cache.wait(prompt, salt=request.salt, limit=len(prompt) - 1)
        if request.wait is not None:
            self.seen["waited"] += 1
            return False
        prompt = request.tokens[: request.num_prompt]
        hit = self.cache.acquire(prompt, salt=request.salt, limit=len(prompt) - 1)
        request.hit, request.blocks = hit, list(hit.blocks)
        self.running.append(request)  # from here on `held` counts what it has
        num_blocks = -(-len(request.tokens) // BLOCK) - len(hit.blocks) if self.blocks is not None else 0
        short_blocks = max(0, num_blocks - self.blocks.num_free) if self.blocks is not None else 0
        short_slots = int(self.slots is not None and not self.slots.num_free)
        if short_blocks or short_slots:
            self.evict(short_blocks, short_slots)
        if (self.blocks and self.blocks.num_free < num_blocks) or (self.slots and not self.slots.num_free):
            self.cache.release(hit)
            self.running.remove(request)
            request.hit, request.blocks = None, []
            self.seen["no room"] += 1
            return False
        request.blocks += self.blocks.allocate(num_blocks) if self.blocks is not None else []
        request.slot = self.slots.allocate(1)[0] if self.slots is not None else None
        request.flight = self.cache.announce(prompt, salt=request.salt, hit=hit, stops=[len(prompt) // 2])
        request.num_computed = request.num_planned = hit.num_tokens
        self.seen["hit"] += bool(hit.num_tokens)
        return True

    def plan(self, request: Running) -> None:
        flight = request.flight
        end = min(len(request.tokens), request.num_computed + self.rng.randint(1, 14))
        if flight is not None:
            end = min(end, request.num_prompt, flight.next_stop or end)
            flight.num_planned = end
            if flight.is_at_stop and self.slots is not None:
                if not self.slots.num_free:
                    self.evict(0, 1)
                if self.slots.num_free:
                    (request.copy_slot,) = self.slots.allocate(1)
                else:
                    self.seen["no slot"] += 1
        request.num_planned = end

    def compute(self, request: Running) -> None:
        """What the runner does: copies, then the step, then the copy of the state."""
        hit, start, end = request.hit, request.num_computed, request.num_planned
        if hit is not None and hit.tail_block is not None:
            for offset in range(hit.num_tokens % BLOCK):
                self.kv[request.blocks[len(hit.blocks)], offset] = self.kv[hit.tail_block, offset]
        if request.slot is not None:
            before = self.state[hit.slot] if hit is not None and hit.slot is not None else self.state.get(request.slot)
            assert start == 0 or before == (request.salt, request.tokens[:start])
            self.state[request.slot] = (request.salt, request.tokens[:end])
        if self.blocks is not None:
            for i in range(end):
                place, content = (request.blocks[i // BLOCK], i % BLOCK), (request.salt, request.tokens[: i + 1])
                assert i >= start or self.kv[place] == content
                self.kv[place] = content
        if request.copy_slot is not None:
            assert request.slot is not None
            self.state[request.copy_slot] = self.state[request.slot]

    def add(self, request: Running, slot: int | None, *, is_shared: bool = False) -> None:
        tokens, salt = request.tokens[: request.num_computed], request.salt
        if self.slots is None:
            self.cache.insert(tokens, request.blocks, salt=salt)
            for i in range(len(tokens) // BLOCK):
                self.naive.setdefault((salt, tokens[: (i + 1) * BLOCK]), request.blocks[i])
        else:
            assert slot is not None
            self.cache.add_checkpoint(tokens, request.blocks, salt=salt, slot=slot, is_shared=is_shared)
            self.naive.setdefault((salt, tokens), slot)
        for place, block, kept in self.duplicates(request):
            assert request.blocks[place] == block != kept
            assert all(self.kv[block, i] == self.kv[kept, i] for i in range(BLOCK))
            if self.rng.random() < 0.5 and self.blocks is not None:
                self.blocks.share([kept])
                self.blocks.free([block])
                request.blocks[place] = kept
            self.seen["duplicate"] += 1

    def duplicates(self, request: Running) -> Iterator[tuple[int, int, int]]:
        """Places of a request's blocks, the block there, and that of the same tokens that the cache had already."""
        node = self.cache._trie.roots.get(request.salt)
        for place in range(request.num_computed // BLOCK):
            node = node and node.children.get(request.tokens[place * BLOCK : (place + 1) * BLOCK])
            if node is not None and node.block is not None and node.block != request.blocks[place]:
                yield place, request.blocks[place], node.block

    def commit(self, request: Running) -> None:
        request.num_computed = request.num_planned
        if request.hit is not None:
            self.cache.release_sources(request.hit)
            request.hit = None
        if request.flight is not None:
            request.flight.num_computed = request.num_computed
            if self.slots is None:
                self.add(request, None)
            elif request.copy_slot is not None:
                self.add(request, request.copy_slot, is_shared=request.flight.stops[request.num_computed])
                self.slots.free([request.copy_slot])
                request.copy_slot = None
        if request.num_computed >= request.num_prompt or request.will_abort:
            self.land(request)
        if request.will_abort or request.num_computed == len(request.tokens):
            if not request.will_abort:
                self.add(request, request.slot)
            self.running.remove(request)
            if self.blocks is not None:
                self.blocks.free(request.blocks)
            if self.slots is not None and request.slot is not None:
                self.slots.free([request.slot])

    def land(self, request: Running) -> None:
        if request.flight is not None:
            self.cache.land(request.flight)
            request.flight = None

    def step(self) -> None:
        for request in self.running:
            self.plan(request)
        for request in list(self.waiting):
            if len(self.running) < 6 and self.admit(request):
                self.waiting.remove(request)
                self.plan(request)
            self.check()
        freed_blocks = set(self.blocks.drain_freed()) if self.blocks is not None else set()
        self.kv = {place: content for place, content in self.kv.items() if place[0] not in freed_blocks}
        for slot in self.slots.drain_freed() if self.slots is not None else ():
            self.state.pop(slot, None)
        assert self.running or not self.waiting, "requests wait, yet nothing can run"
        for request in self.running:
            self.compute(request)
        for request in list(self.running):
            self.commit(request)
            self.check()


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
