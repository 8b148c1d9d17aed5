"""Prefixes beyond the device's memory: in the host's, on disk.

A prefix is kept in parts: keys and values of every `chunk_tokens` tokens are an entry of kind "kv", shared by all
prefixes that begin alike, and the state after exactly `p` tokens is one of kind "state", with the keys and values
behind the last full chunk. So a conversation of many turns keeps its tokens once and a state for each turn.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor

from qnext.engine.execution import transfer
from qnext.engine.execution.cache import Cache
from qnext.engine.policy.archive import Load
from qnext.engine.policy.prefix_node import Spill, Tokens
from qnext.engine.storage.disk import QUEUE_BYTES, DiskStore
from qnext.engine.storage.fingerprint import fingerprint
from qnext.engine.storage.host import HostEntry, HostStore
from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.planning import machine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiskCache:
    """Where an engine keeps prefixes that it has no memory for, and finds them after a restart.

    The files have at most `max_bytes` together; what waits to be written, at most `queue_bytes` of memory, and what
    comes when that is full is lost. Prefixes of fewer than `min_tokens` are not kept. They are written when memory is
    short and when the engine is closed; with `at_once` also when they are cached, so that a killed process leaves them.
    """

    folder: Path | str
    max_bytes: int
    at_once: bool = False
    min_tokens: int = 256
    chunk_tokens: int = 1024
    queue_bytes: int = QUEUE_BYTES


class PrefixPart(NamedTuple):
    """One entry of a prefix: `end` tokens make its key, and it holds the blocks of those from `start` on."""

    kind: str
    start: int
    end: int


class Tiers:
    """The archive of one engine: `host_bytes` of the host's memory (0: none), then the disk, if any.

    Belongs to the engine's thread; one thread of its own reads files, one writes them, both end in `close`.
    """

    def __init__(self, model: CausalLM, cache: Cache, *, host_bytes: int, disk: DiskCache | None) -> None:
        settings = disk or DiskCache("", 1)
        if settings.chunk_tokens <= 0 or settings.chunk_tokens % cache.block_size:
            raise UsageError(f"chunk_tokens is {settings.chunk_tokens}, must be a multiple of {cache.block_size}")
        self.cache = cache
        self.min_tokens = settings.min_tokens
        self.chunk_tokens = settings.chunk_tokens
        self.saves_at_once = settings.at_once and disk is not None
        self.disk: DiskStore | None = None
        self.host: HostStore | None = None
        if host_bytes:
            pinned = cache.device.type == "cuda"
            self.host = HostStore(max_bytes=host_bytes, pinned=pinned, on_evict=self._move_to_disk)
        if disk is not None:
            of_model = fingerprint(model, cache, chunk=disk.chunk_tokens)
            self.disk = DiskStore(
                disk.folder, max_bytes=disk.max_bytes, fingerprint=of_model, queue_bytes=disk.queue_bytes
            )
        self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefix-cache-reader")
        self._is_closing = self._has_warned = False
        self._fetches: WeakValueDictionary[int, PrefixFetch] = WeakValueDictionary()
        self._fetch_ids = itertools.count()

    # ---- what the scheduler asks ----

    def find(self, tokens: Tokens, *, salt: str, above: int, limit: int) -> PrefixFetch | None:
        """The longest prefix whose parts are all in some tier."""
        key = _salt_bytes(salt)
        if limit <= above:
            return None
        whole = self._lengths("kv", key, tokens, limit) if self.cache.kv else set()
        num_whole = 0  # tokens of full chunks without a gap
        while num_whole + self.chunk_tokens in whole:
            num_whole += self.chunk_tokens
        if not self.cache.delta:
            best = num_whole
        else:
            reach = num_whole + self.chunk_tokens if self.cache.kv else limit + 1
            best = max((p for p in self._lengths("state", key, tokens, limit) if p < reach), default=0)
        if best <= above:
            return None
        fetch = PrefixFetch(self, next(self._fetch_ids), tokens[:best], key)
        self._fetches[fetch.id] = fetch
        return fetch

    def write(self, load: Load) -> None:
        """Copy what has come to its place in the cache."""
        self._fetches[load.fetch_id].write(load)

    def save(self, spills: Sequence[Spill]) -> None:
        """Copy prefixes out of the cache, as far as a tier lacks them. Called before the cache changes."""
        for spill in spills:
            try:
                self._save(spill)
            except (RuntimeError, MemoryError) as error:  # torch has a RuntimeError for lack of memory
                if not self._has_warned:
                    self._has_warned = True
                    _log.warning("a prefix could not be saved: %s", error)

    def held_bytes(self, owner: str) -> tuple[int, int]:
        """Of one owner, in the host's memory and on disk. Any thread may ask."""
        digest, host, disk = _owner_digest(owner), self.host, self.disk
        return 0 if host is None else host.held_bytes(digest), 0 if disk is None else disk.held_bytes(digest)

    def close(self, spills: Sequence[Spill] = ()) -> None:
        """Write what the host holds and these prefixes to disk, where there is one, and end the threads."""
        if self._is_closing:
            return
        self._is_closing = True
        self.reader.shutdown(wait=True, cancel_futures=True)
        if self.disk is not None:
            if self.host is not None:
                self.host.clear()
            self.save(spills)
            self.disk.close()

    # ---- parts ----

    def parts(self, num_tokens: int) -> list[PrefixPart]:
        """What a prefix of so many tokens consists of."""
        step = self.chunk_tokens
        num_whole = num_tokens // step * step if self.cache.kv else 0
        parts = [PrefixPart("kv", start, start + step) for start in range(0, num_whole, step)]
        return [*parts, PrefixPart("state", num_whole, num_tokens)] if self.cache.delta else parts

    def blocks_of(self, part: PrefixPart) -> range:
        """The numbers of the blocks in a part, counted from the prefix's first."""
        size = self.cache.block_size
        return range(part.start // size, -(-part.end // size)) if self.cache.kv else range(0)

    def get(self, part: PrefixPart, salt: bytes, tokens: Tokens, *, from_disk: bool) -> dict[str, Tensor] | None:
        """A part's tensors where the tier has them, and they are those of this cache."""
        store = self.disk if from_disk else self.host
        found = store.get(part.kind, salt, tokens[: part.end]) if store is not None else None
        if found is None:
            return None
        num_blocks = len(self.blocks_of(part))
        fits = not num_blocks or transfer.has_shape_of(found, transfer.pages_of(self.cache), num_blocks=num_blocks)
        if part.kind == "state":
            fits = fits and transfer.has_shape_of(found, transfer.states_of(self.cache), num_blocks=None)
        return found if fits else None

    def _lengths(self, kind: str, salt: bytes, tokens: Tokens, limit: int) -> set[int]:
        stores = (self.host, self.disk)
        return {p for s in stores if s is not None for p in s.lengths(kind, salt, tokens, limit=limit)}

    def _save(self, spill: Spill) -> None:
        parts = self.parts(len(spill.tokens))
        if len(spill.tokens) < self.min_tokens or not parts:
            return
        num_blocks = sum(len(self.blocks_of(part)) for part in parts)
        num_bytes = num_blocks * transfer.block_bytes(self.cache) + transfer.slot_bytes(self.cache)
        disk = self.disk if self.disk is not None and not self.disk.has_failed else None
        host = self.host if not self._is_closing else None
        stores = [s for s in (host, disk) if s is not None and num_bytes <= s.max_bytes]
        for store in stores if self.saves_at_once else stores[:1]:
            self._save_to(store, spill, parts)

    def _save_to(self, store: HostStore | DiskStore, spill: Spill, parts: Sequence[PrefixPart]) -> None:
        """Chunks before the state, so that what is there can be used; what was there counts as used."""
        salt, owner, num_tokens = _salt_bytes(spill.salt), _owner_digest(spill.owner), len(spill.tokens)
        for kind in ("kv", "state"):
            wanted = [part for part in parts if part.kind == kind]
            known = set(store.lengths(kind, salt, spill.tokens, limit=num_tokens)) if wanted else set()
            for part in wanted:
                if part.end not in known and not self._put(
                    store, kind, salt, owner, spill.tokens[: part.end], self._read(spill, part)
                ):
                    return
        for kind in ("state", "kv"):
            store.touch(kind, salt, spill.tokens, [part.end for part in parts if part.kind == kind])

    def _read(self, spill: Spill, part: PrefixPart) -> dict[str, Tensor]:
        numbers, tensors = self.blocks_of(part), {}
        if numbers:
            blocks = spill.blocks[numbers.start : numbers.stop]
            tensors = transfer.read_blocks(self.cache, blocks, num_tokens=part.end - part.start)
        if part.kind == "state":
            assert spill.slot is not None
            tensors |= transfer.read_slot(self.cache, spill.slot)
        return tensors

    def _put(
        self,
        store: HostStore | DiskStore,
        kind: str,
        salt: bytes,
        owner: bytes,
        tokens: Sequence[int],
        tensors: dict[str, Tensor],
    ) -> bool:
        if store.put(kind, salt, tokens, tensors, owner=owner):
            return True
        if not self._is_closing or not isinstance(store, DiskStore):
            return False
        store.flush()  # nobody waits for this engine any more
        return not store.has_failed and store.put(kind, salt, tokens, tensors, owner=owner)

    def _move_to_disk(self, entry: HostEntry) -> None:
        if self.disk is not None and not self.disk.has_failed:
            self._put(self.disk, entry.kind, entry.salt, entry.owner, entry.tokens, entry.tensors)


class PrefixFetch:
    """A prefix that `Tiers.find` found. What the host has is taken at once, the rest is read by a thread."""

    def __init__(self, tiers: Tiers, number: int, tokens: Tokens, salt: bytes) -> None:
        self.id = number
        self.num_tokens = len(tokens)
        self._tiers, self._tokens, self._salt = tiers, tokens, salt
        self._parts = tiers.parts(len(tokens))
        self._found: list[dict[str, Tensor] | None] = []
        self._future: Future[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._future is not None and not self._future.done()

    @property
    def is_good(self) -> bool:
        return not self.is_open and bool(self._found) and all(tensors is not None for tensors in self._found)

    def start(self) -> None:
        self._found = [self._tiers.get(part, self._salt, self._tokens, from_disk=False) for part in self._parts]
        if any(tensors is None for tensors in self._found):
            self._future = self._tiers.reader.submit(self._read_rest)

    def wait(self, seconds: float) -> None:
        if self._future is not None:
            wait([self._future], timeout=seconds)

    def write(self, load: Load) -> None:
        cache, tiers = self._tiers.cache, self._tiers
        first, end = load.first_block, load.first_block + len(load.blocks)
        for part, tensors in zip(self._parts, self._found, strict=True):
            assert tensors is not None
            numbers = tiers.blocks_of(part)
            low, high = max(first, numbers.start), min(end, numbers.stop)
            if low < high:
                blocks, num_tokens = load.blocks[low - first : high - first], part.end - part.start
                transfer.write_blocks(cache, blocks, tensors, start=low - numbers.start, num_tokens=num_tokens)
            if part.kind == "state":
                assert load.slot is not None
                transfer.write_slot(cache, load.slot, tensors)

    def _read_rest(self) -> None:
        """The last part first: without it the others are of no use. Stops at what is not there."""
        for number in reversed(range(len(self._parts))):
            if self._found[number] is None:
                self._found[number] = self._tiers.get(self._parts[number], self._salt, self._tokens, from_disk=True)
                if self._found[number] is None:
                    return


def check_tiers(prefix_cache: bool, disk_cache: DiskCache | None, host_cache_bytes: int | None) -> None:
    """Raises UsageError for tiers that nothing would come to."""
    if not prefix_cache and (disk_cache is not None or host_cache_bytes):
        raise UsageError("a cache on disk or in the host's memory needs prefix_cache")


def make_tiers(
    model: CausalLM, cache: Cache, prefix_cache: bool, disk_cache: DiskCache | None, host_cache_bytes: int | None
) -> Tiers | None:
    """As EngineConfig says. Raises UsageError."""
    check_tiers(prefix_cache, disk_cache, host_cache_bytes)
    if not prefix_cache:
        return None
    if host_cache_bytes is None:
        host_cache_bytes = machine.available_bytes() // 8 if cache.device.type == "cuda" else 0
    if disk_cache is None and not host_cache_bytes:
        return None
    return Tiers(model, cache, host_bytes=host_cache_bytes, disk=disk_cache)


def _salt_bytes(salt: str) -> bytes:
    return salt.encode("utf-8", "surrogatepass")


def _owner_digest(owner: str) -> bytes:
    """What stands for an owner in a store: its name does not."""
    return hashlib.blake2b(owner.encode("utf-8", "surrogatepass"), digest_size=16, person=b"prefix owner").digest()
