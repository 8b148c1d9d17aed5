"""Caches of prefixes for tests, and random traffic on them that checks everything after every operation."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from qnext.engine.policy.blocks import RefPool
from qnext.engine.policy.flights import Flight, Wait
from qnext.engine.policy.prefix import Hit, PrefixCache

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
