"""A disk store holds no more than it may, and what goes first is what its order of uses and its owners say."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path

import pytest

from qnext.engine.storage import disk
from tests.engine.disk_stores import entries, file_bytes, folder_bytes, hold_writer, open_store, same_bits, sized


class NaiveStore:
    """What a store holds, as a list of whole keys: least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held: OrderedDict[tuple[str, bytes, tuple[int, ...]], tuple[int, int]] = OrderedDict()

    def put(self, key: tuple[str, bytes, tuple[int, ...]], value: int, num_bytes: int) -> bool:
        if key not in self.held:
            if num_bytes > self.max_bytes:
                return False
            while sum(size for _, size in self.held.values()) + num_bytes > self.max_bytes:
                self.held.popitem(last=False)
            self.held[key] = (value, num_bytes)
        self.held.move_to_end(key)
        return True

    def get(self, key: tuple[str, bytes, tuple[int, ...]]) -> int | None:
        if key not in self.held:
            return None
        self.held.move_to_end(key)
        return self.held[key][0]

    def lengths(self, kind: str, salt: bytes, tokens: tuple[int, ...], limit: int) -> list[int]:
        return [p for p in range(1, len(tokens) + 1) if p <= limit and (kind, salt, tokens[:p]) in self.held]


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_against_a_naive_model(tmp_path: Path, seed: int) -> None:
    """Same answers, same victims, within the bound at every rest; every fiftieth time through a restart."""
    chance, max_bytes = random.Random(seed), 12_000
    naive, store = NaiveStore(max_bytes), open_store(tmp_path, max_bytes=max_bytes)
    found = evictions = 0
    for turn in range(1200):
        kind, salt = chance.choice(["kv", "state"]), chance.choice([b"", b"s"])
        tokens = tuple(chance.randint(0, 1) for _ in range(chance.randint(1, 7)))
        if chance.random() < 0.5:
            tensors = sized(chance.choice([1, 300, 1000, 13_000]), turn % 256)
            num_bytes = file_bytes(kind, salt, len(tokens), tensors)
            held = len(naive.held)
            assert store.put(kind, salt, tokens, tensors) == naive.put((kind, salt, tokens), turn % 256, num_bytes)
            evictions += len(naive.held) <= held
        else:
            value, got = naive.get((kind, salt, tokens)), store.get(kind, salt, tokens)
            assert (got is None) == (value is None)
            found += got is not None
            assert got is None or set(got["x"].tolist()) == {value}
        limit = chance.randint(0, 8)
        assert store.lengths(kind, salt, tokens, limit=limit) == naive.lengths(kind, salt, tokens, limit)
        assert store.longest(kind, salt, tokens, limit=limit) == max(
            naive.lengths(kind, salt, tokens, limit), default=0
        )
        if turn % 7 == 0:
            store.flush()
            assert folder_bytes(tmp_path) == sum(size for _, size in naive.held.values()) <= max_bytes
        if turn % 50 == 49:
            store.close()
            assert folder_bytes(tmp_path) == sum(size for _, size in naive.held.values())
            store = open_store(tmp_path, max_bytes=max_bytes)
            assert store.statistics().num_entries == len(naive.held)
    assert store.statistics().num_damaged == 0
    assert found > 20
    assert evictions > 20
    store.close()


def test_a_smaller_bound_evicts_the_oldest_when_opened(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for token in range(1, 6):
            store.put("kv", b"", [token], sized(1000))
        store.flush()
        assert store.get("kv", b"", [1]) is not None
        size = store.statistics().entry_bytes // 5
    with open_store(tmp_path, max_bytes=2 * size + 10) as store:
        assert [t for t in range(1, 6) if store.longest("kv", b"", [t], limit=1)] == [1, 5]
        assert folder_bytes(tmp_path) == 2 * size


def test_a_flood_of_one_owner_takes_nothing_within_anothers_share(tmp_path: Path) -> None:
    """By the bytes on disk, and after a restart too: whose an entry is stands in its file, and its name does not."""
    own = [("state", b"salt", [n, n]) for n in range(3)]
    names = (b"alice's digest", b"mallory's digest")
    with open_store(tmp_path, max_bytes=20_000) as store:
        for key in own:
            assert store.put(*key, sized(1_000), owner=names[0])
    for start in (0, 300):
        with open_store(tmp_path, max_bytes=20_000) as store:
            for n in range(start, start + 300):
                assert store.put("state", b"salt %d" % n, [n], sized(1_000), owner=names[1])
                store.flush()
            held = store._owned.held
            assert held[names[0].hex()] < 10_000 < held[names[1].hex()] and sum(held.values()) <= 20_000
            assert sum(held.values()) > 18_000, "what nobody else needs may be used"
            assert all(store.get(*key) is not None for key in own)
    with open_store(tmp_path, max_bytes=8_000) as store:
        assert all(store.get(*key) is not None for key in own), "a smaller bound is shared too"
        assert store.statistics().entry_bytes <= 8_000


def test_an_owner_uses_all_until_another_comes_and_then_loses_what_it_used_longest_ago(tmp_path: Path) -> None:
    with open_store(tmp_path, max_bytes=12_000) as store:
        for n in range(8):
            store.put("kv", b"a", [n], sized(1_000), owner=b"a")
        store.flush()
        assert store.get("kv", b"a", [0]) is not None
        for n in range(8):
            store.put("kv", b"b", [n], sized(1_000), owner=b"b")
            store.flush()
        left = {owner: [n for n in range(8) if store.get("kv", owner, [n])] for owner in (b"a", b"b")}
        assert [len(numbers) for numbers in left.values()] == [4, 5]
        assert 0 in left[b"a"] and left[b"b"] == list(range(8 - len(left[b"b"]), 8))
        assert not store.put("kv", b"c", [1], sized(9_000), owner=b"c"), "more than a share, others within theirs"
        assert store.statistics().num_refused == 1


def test_a_full_queue_has_room_for_another_owner(tmp_path: Path) -> None:
    with open_store(tmp_path, queue_bytes=20_000) as store:
        store.put("kv", b"b", [1], sized(1_000), owner=b"b")
        store.flush()
        release = hold_writer(store)
        taken = [store.put("kv", b"a", [n], sized(1_000), owner=b"a") for n in range(30)]
        assert 5 < sum(taken) < 12 and store.put("kv", b"b", [2], sized(1_000), owner=b"b")
        assert store.statistics().queued_bytes <= 20_000
        release()
        store.flush()
        assert not store._queued_of


def test_the_order_of_uses_survives_a_clock_that_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(2_000_000_000_000_000_000, 0, -1_000_000_000_000))
    monkeypatch.setattr(disk.time, "time_ns", lambda: next(times))
    with open_store(tmp_path) as store:
        for token in range(1, 6):
            store.put("kv", b"", [token], sized(1000))
        size = store.statistics().entry_bytes // 5
    with open_store(tmp_path, max_bytes=2 * size) as store:
        assert [t for t in range(1, 6) if store.longest("kv", b"", [t], limit=1)] == [4, 5]


def test_what_does_not_fit_the_queue_is_dropped(tmp_path: Path) -> None:
    size = file_bytes("kv", b"", 1, sized(1000))
    with open_store(tmp_path, queue_bytes=2 * size) as store:
        release = hold_writer(store)
        assert [store.put("kv", b"", [token], sized(1000)) for token in (1, 2, 3)] == [True, True, False]
        assert store.statistics().num_dropped == 1
        assert store.statistics().queued_bytes == 2 * size
        release()
        store.flush()
        assert store.put("kv", b"", [3], sized(50_000))  # more than the queue, but the queue is empty
    assert len(entries(tmp_path)) == 3


def test_what_is_evicted_from_the_queue_is_never_written(tmp_path: Path) -> None:
    size = file_bytes("kv", b"", 1, sized(1000))
    with open_store(tmp_path, max_bytes=2 * size) as store:
        release = hold_writer(store)
        for token in range(1, 8):
            assert store.put("kv", b"", [token], sized(1000, token))
        store.put("kv", b"", [1], sized(1000, 99))  # again, after it was evicted
        release()
        store.flush()
        assert store.statistics().num_written <= 3  # the writer may have held the first
        assert [t for t in range(1, 8) if store.get("kv", b"", [t]) is not None] == [1, 7]
        assert same_bits(store.get("kv", b"", [1]), sized(1000, 99))
    assert len(entries(tmp_path)) == 2
