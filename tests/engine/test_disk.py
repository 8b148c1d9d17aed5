"""The disk store: what comes back is bit for bit what was put, or nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import stat
import subprocess
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.engine.storage import disk, disk_entry
from qnext.engine.storage.disk import ENTRY_SUFFIX, PARTIAL_SUFFIX, DiskStore
from qnext.engine.storage.disk_entry import PREFIX, PrefixHasher, make_fingerprint, token_bytes
from qnext.engine.storage.disk_folder import LOCK_FILE
from qnext.errors import UsageError

MODEL = make_fingerprint(b"weights", version="1", block_size=16)
ROOT = Path(__file__).parent.parent.parent


def open_store(folder: Path, *, max_bytes: int = 1 << 24, fingerprint: bytes = MODEL, **options: int) -> DiskStore:
    return DiskStore(folder, max_bytes=max_bytes, fingerprint=fingerprint, **options)


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Every bit pattern, NaNs with payloads among them; sizes that leave gaps before the next tensor."""
    generator = torch.Generator().manual_seed(seed)

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        last = shape[-1] * dtype.itemsize
        return torch.randint(0, 256, (*shape[:-1], last), dtype=torch.uint8, generator=generator).view(dtype)

    return {
        "conv.0": of(torch.float32, 3, 5),
        "state.0": of(torch.float32, 2, 3, 7),
        "keys": of(torch.bfloat16, 2, 16, 9),
        "codes": of(torch.int8, 2, 16, 3),
        "scales": of(torch.float16, 1),
        "empty": torch.empty(0, 4),
        "transposed": of(torch.bfloat16, 4, 6).T,
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same_bits(left: dict[str, Tensor] | None, right: dict[str, Tensor]) -> bool:
    return (
        left is not None
        and list(left) == list(right)
        and all(
            left[name].dtype == right[name].dtype
            and left[name].shape == right[name].shape
            and bits(left[name]).equal(bits(right[name]))
            for name in right
        )
    )  # fmt: skip


def sized(num_bytes: int, value: int = 1) -> dict[str, Tensor]:
    return {"x": torch.full((num_bytes,), value, dtype=torch.uint8)}


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*" + ENTRY_SUFFIX))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A closed store with one entry, of the tokens 1 to 21."""
    with open_store(tmp_path / "store") as store:
        assert store.put("state", b"salt", range(1, 22), random_tensors(5))
    return tmp_path / "store"


def test_round_trip_from_queue_disk_and_after_a_restart(tmp_path: Path) -> None:
    tensors = random_tensors(1)
    with open_store(tmp_path) as store:
        release = hold_writer(store)
        assert store.put("state", b"", [1, 2, 3], tensors)
        queued = store.get("state", b"", [1, 2, 3])
        assert same_bits(queued, tensors)
        assert queued is not None
        queued["conv.0"].zero_()  # the caller's own: neither the queue's copy nor the file sees it
        assert store.statistics().queued_bytes > 0
        release()
        store.flush()
        assert store.statistics().queued_bytes == 0
        assert same_bits(store.get("state", b"", [1, 2, 3]), tensors)
    with open_store(tmp_path) as store:
        assert same_bits(store.get("state", b"", [1, 2, 3]), tensors)
        assert store.get("state", b"", [1, 2]) is None
        assert store.get("state", b"", [1, 2, 3, 4]) is None
        assert store.get("kv", b"", [1, 2, 3]) is None
        counts = store.statistics()
        assert (counts.num_hits, counts.num_misses, counts.num_entries, counts.num_damaged) == (1, 3, 1, 0)
        assert counts.entry_bytes == entries(tmp_path)[0].stat().st_size


def hold_writer(store: DiskStore) -> Callable[[], None]:
    """The writer waits before its next file until the returned function is called."""
    go, write = threading.Event(), store._write_file

    def waiting(entry: disk._Entry) -> None:
        assert go.wait(60)
        write(entry)

    store._write_file = waiting  # type: ignore[method-assign]
    return go.set


def test_what_is_put_is_copied_at_once(tmp_path: Path) -> None:
    tensors = sized(100, 7)
    with open_store(tmp_path) as store:
        release = hold_writer(store)
        store.put("kv", b"", [1], tensors)
        tensors["x"].zero_()
        release()
        store.flush()
        assert same_bits(store.get("kv", b"", [1]), sized(100, 7))


def test_files_and_folder_are_private(filled: Path) -> None:
    assert stat.S_IMODE(filled.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in filled.iterdir()} == {0o600}
    assert len(list(filled.iterdir())) == 2


def test_salts_and_kinds_and_models_are_apart(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for value, (kind, salt) in enumerate([("kv", b"a"), ("kv", b"b"), ("k", b"va"), ("state", b"a")]):
            assert store.get(kind, salt, [1, 2]) is None
            assert store.longest(kind, salt, [1, 2], limit=2) == 0
            store.put(kind, salt, [1, 2], sized(10, value))
        for value, (kind, salt) in enumerate([("kv", b"a"), ("kv", b"b"), ("k", b"va"), ("state", b"a")]):
            assert same_bits(store.get(kind, salt, [1, 2]), sized(10, value))
    with open_store(tmp_path, fingerprint=make_fingerprint(b"weights", version="2", block_size=16)) as store:
        assert store.get("kv", b"a", [1, 2]) is None
        assert store.statistics().num_damaged == 4
    assert not entries(tmp_path)


def test_fingerprint_depends_on_every_fact() -> None:
    made = [make_fingerprint(b"w"), make_fingerprint(b"v"), make_fingerprint(b"w", a=1), make_fingerprint(b"w", a="1")]
    assert len(set(made)) == 4
    assert make_fingerprint(b"w", a=1, b=2) == make_fingerprint(b"w", b=2, a=1)


def test_a_collision_of_names_gives_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PrefixHasher, "names", lambda self, tokens, lengths: ((length, "0" * 40) for length in lengths)
    )  # fmt: skip
    with open_store(tmp_path) as store:
        store.put("kv", b"a", [1, 2], sized(10, 1))
        for _ in ("in the queue or on disk", "on disk"):
            assert store.get("kv", b"a", [1, 3]) is None
            assert store.get("kv", b"b", [1, 2]) is None
            assert store.get("state", b"a", [1, 2]) is None
            assert same_bits(store.get("kv", b"a", [1, 2]), sized(10, 1))
            store.flush()
        assert store.statistics().num_damaged == 0


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


def file_bytes(kind: str, salt: bytes, num_tokens: int, tensors: dict[str, Tensor]) -> int:
    header = disk_entry.make_header(kind, salt, num_tokens, tensors)
    return PREFIX.size + len(disk_entry.encode_header(header, MODEL)) + header.body_bytes


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


def test_an_entry_of_another_version_of_the_form_is_deleted(filled: Path) -> None:
    (path,) = entries(filled)
    data = bytearray(path.read_bytes())
    data[8:12] = (1).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    check_that_nothing_is_used(filled)


def test_the_order_of_uses_survives_a_clock_that_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(2_000_000_000_000_000_000, 0, -1_000_000_000_000))
    monkeypatch.setattr(disk.time, "time_ns", lambda: next(times))
    with open_store(tmp_path) as store:
        for token in range(1, 6):
            store.put("kv", b"", [token], sized(1000))
        size = store.statistics().entry_bytes // 5
    with open_store(tmp_path, max_bytes=2 * size) as store:
        assert [t for t in range(1, 6) if store.longest("kv", b"", [t], limit=1)] == [4, 5]


def test_longest_of_many_tokens_and_lengths(tmp_path: Path) -> None:
    tokens = [(7 * i) % 151_936 for i in range(262_144)]
    with open_store(tmp_path, max_bytes=1 << 28) as store:
        for length in (1, 16, 4_000, 70_001, 262_144):
            store.put("state", b"", tokens[:length], sized(1))
        other = [*tokens[:70_000], 5]
        store.put("state", b"", other, sized(1))
        assert store.lengths("state", b"", tokens, limit=10**9) == [1, 16, 4_000, 70_001, 262_144]
        assert store.longest("state", b"", tokens, limit=262_143) == 70_001
        assert store.longest("state", b"", other + tokens[70_001:], limit=262_144) == 70_001
        assert store.longest("state", b"", [*other[:-1], 6], limit=262_144) == 4_000


# Damage.


def positions(path: Path) -> list[tuple[str, int]]:
    """A byte of each region: every byte of the prefix, some of the header, tokens, gap, tensors and the last."""
    data = path.read_bytes()
    header_bytes = PREFIX.unpack(data[: PREFIX.size])[2]
    body = PREFIX.size + header_bytes
    return [
        *(("prefix", at) for at in range(PREFIX.size)),
        *(("header", at) for at in range(PREFIX.size, body, 17)),
        ("tokens", body), ("tokens", body + 83), ("gap", body + 90), ("tensor", body + 128), ("last", len(data) - 1),
        *(("any", at) for at in range(body, len(data), 61)),
    ]  # fmt: skip


def test_a_flipped_bit_anywhere_is_found_by_a_new_store_and_by_a_running_one(filled: Path) -> None:
    (path,) = entries(filled)
    whole = path.read_bytes()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    for region, at in positions(path):
        for is_open in (False, True):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << (at % 8)
            path.write_bytes(whole)
            path.chmod(0o600)
            os.utime(path, ns=times)
            if not is_open:
                path.write_bytes(damaged)
            with open_store(filled) as store:
                if is_open:
                    path.write_bytes(damaged)
                assert store.get("state", b"salt", range(1, 22)) is None, (region, at)
                assert store.longest("state", b"salt", range(1, 22), limit=21) == 0
                assert store.statistics().num_damaged == 1
                assert store.statistics().entry_bytes == 0
                assert not path.exists()
                # The place is free again.
                assert store.put("state", b"salt", range(1, 22), random_tensors(5))
                store.flush()
                assert same_bits(store.get("state", b"salt", range(1, 22)), random_tensors(5))
    assert path.read_bytes() == whole


def check_that_nothing_is_used(folder: Path, *, damaged: int = 1) -> None:
    with open_store(folder) as store:
        assert store.get("state", b"salt", range(1, 22)) is None
        assert store.statistics().num_damaged == damaged
        assert store.statistics().num_entries == 0
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("keep", [0, 1, 31, 32, 33, 200, -1, "longer", "zeros"])
def test_a_cut_or_longer_file_is_deleted(filled: Path, keep: int | str) -> None:
    (path,) = entries(filled)
    whole = path.read_bytes()
    cut = {"longer": whole + b"\0", "zeros": bytes(len(whole))}
    path.write_bytes(cut[keep] if isinstance(keep, str) else whole[:keep])
    check_that_nothing_is_used(filled)


def test_a_file_that_is_cut_while_the_store_runs(filled: Path) -> None:
    with open_store(filled) as store:
        os.truncate(entries(filled)[0], 300)
        assert store.get("state", b"salt", range(1, 22)) is None
        assert store.statistics().num_damaged == 1


def test_a_file_that_somebody_deleted_is_a_miss(filled: Path) -> None:
    with open_store(filled) as store:
        entries(filled)[0].unlink()
        assert store.get("state", b"salt", range(1, 22)) is None
        counts = store.statistics()
        assert (counts.num_misses, counts.num_damaged, counts.num_entries, counts.entry_bytes) == (1, 0, 0, 0)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_may_touch_is_deleted(filled: Path, mode: int) -> None:
    entries(filled)[0].chmod(mode)
    check_that_nothing_is_used(filled)


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_what_is_no_file_is_deleted_and_not_followed(filled: Path, tmp_path: Path, kind: str) -> None:
    (path,) = entries(filled)
    target = tmp_path / "elsewhere"
    path.rename(target)
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    check_that_nothing_is_used(filled)
    assert target.exists()


def test_names_of_the_store_on_other_files(filled: Path) -> None:
    """A whole entry under another's name is found when it is read, the rest when the store is opened."""
    (path,) = entries(filled)
    other = PrefixHasher(MODEL, "state", b"salt").name(token_bytes(range(2, 23)))
    path.rename(filled / (other + ENTRY_SUFFIX))
    for name in (
        "0" * 40 + ENTRY_SUFFIX,
        "short" + ENTRY_SUFFIX,
        "1" * 40 + PARTIAL_SUFFIX,
        ENTRY_SUFFIX + ENTRY_SUFFIX,
    ):
        (filled / name).write_bytes(b"rubbish")
    with open_store(filled) as store:
        assert store.statistics().num_damaged == 4
        assert store.get("state", b"salt", range(2, 23)) is None
        assert store.statistics().num_damaged == 5
    assert [path.name for path in filled.iterdir()] == [LOCK_FILE]


def test_names_that_are_none_of_the_store_are_left_alone(filled: Path) -> None:
    (filled / "notes.txt").write_text("mine")
    (filled / "folder").mkdir()
    with open_store(filled) as store:
        assert store.statistics().num_foreign == 2
        assert store.statistics().num_entries == 1
    assert (filled / "notes.txt").read_text() == "mine"


def test_what_cannot_be_deleted_counts_against_the_bound(filled: Path) -> None:
    stuck = filled / ("0" * 40 + ENTRY_SUFFIX)
    stuck.mkdir()
    size = stuck.stat().st_size
    entry = file_bytes("kv", b"", 1, sized(1000))
    with open_store(filled, max_bytes=size + entry) as store:
        assert store.put("kv", b"", [1], sized(1000))
        assert store.statistics().num_evicted == 1
        assert not store.put("kv", b"", [2], sized(1100))
        assert store.statistics().num_refused == 1


def headers() -> Iterator[object]:
    good = {
        "fingerprint": MODEL.hex(), "kind": "state", "salt": "", "num_tokens": 3, "tensors": [["x", "int8", [2, 2]]],
    }  # fmt: skip
    wrong = [
        None,
        -1,
        1.5,
        True,
        "x",
        "é",
        "\ud800",
        [],
        {},
        [[]],
        [["x", "int8"]],
        [["x", [], [1]]],
        [["x", "int8", "12"]],
    ]
    wrong += [[["x", "int8", [-2, -2]]], [["x", "int8", [True]]], [["x", "object", [1]]], [["x", "int8", 4]], 10**30]
    for name in good:
        yield {key: value for key, value in good.items() if key != name}
        yield from ({**good, name: value} for value in wrong)
    yield from (1, None, [], "text", [good])


def test_a_header_with_right_checksums_and_wrong_values_never_raises(filled: Path) -> None:
    (path,) = entries(filled)
    texts = [json.dumps(header).encode() for header in headers()]
    texts += [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5_000]
    body = bytes(128)
    for text in texts:
        prefix = PREFIX.pack(b"QNXCACHE", 1, len(text), zlib.crc32(text), zlib.crc32(body), len(body))
        path.write_bytes(prefix + text + body)
        path.chmod(0o600)
        with open_store(filled) as store:
            assert store.get("state", b"salt", range(1, 22)) is None
            assert store.statistics().num_damaged == 1, text[:200]
        assert not path.exists()


# The folder.


def refuses(folder: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        open_store(folder)


def test_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refuses(tmp_path / "link", "no link")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "must be a folder")
    refuses(tmp_path / "file" / "below", "must be a folder")
    for mode in (0o770, 0o702, 0o777):
        (tmp_path / "real").chmod(mode)
        refuses(tmp_path / "real", "writable by others")
    (tmp_path / "real").chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refuses(tmp_path / "real", "belongs to user")
    monkeypatch.undo()
    (tmp_path / "real" / "thesis.txt").write_text("all of it")
    refuses(tmp_path / "real", "neither empty nor a prefix cache")
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="max_bytes"):
        open_store(tmp_path / "new", max_bytes=0)


def test_a_link_in_place_of_the_lock_is_refused(filled: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("not ours")
    (filled / LOCK_FILE).unlink()
    (filled / LOCK_FILE).symlink_to(target)
    refuses(filled, LOCK_FILE)
    assert target.read_text() == "not ours"


def test_a_folder_that_others_may_read_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    open_store(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_one_store_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom qnext.engine.storage.disk import DiskStore\nfrom qnext.errors import UsageError\n"
        "try:\n    DiskStore(sys.argv[1], max_bytes=1000, fingerprint=b'').close()\n"
        "except UsageError as error:\n    sys.exit(str(error))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with open_store(tmp_path) as store:
        store.put("kv", b"", [1], sized(10))
        store.flush()
        refuses(tmp_path, "another engine")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "another engine uses it" in done.stderr
        assert store.get("kv", b"", [1]) is not None  # not touched by those who came too late
    assert subprocess.run(command, check=False).returncode == 0


def test_a_closed_store_is_empty_and_takes_nothing(filled: Path) -> None:
    store = open_store(filled)
    store.close()
    store.close()
    store.flush()
    assert not store.put("kv", b"", [1], sized(1))
    assert store.get("state", b"salt", range(1, 22)) is None
    assert store.longest("state", b"salt", range(1, 22), limit=21) == 0
    assert len(entries(filled)) == 1


# Writing.


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


def test_a_full_disk_is_said_once_and_nothing_is_lost_but_the_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The system's own limit on the size of a file ends a write in its middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_store(tmp_path) as store:
        assert store.put("kv", b"", [1], sized(1000))
        store.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            for token in (2, 3):
                assert store.put("kv", b"", [token], sized(1 << 17))
                store.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (record,) = caplog.records
        assert record.levelname == "WARNING" and "entries are lost" in record.getMessage()
        assert store.has_failed
        assert store.get("kv", b"", [2]) is None
        assert store.longest("kv", b"", [2], limit=1) == 0
        assert store.get("kv", b"", [1]) is not None
        counts = store.statistics()
        assert (counts.num_failed_writes, counts.queued_bytes, counts.num_entries) == (2, 0, 1)
        assert len(list(tmp_path.iterdir())) == 2
        assert store.put("kv", b"", [2], sized(1 << 17))
        store.flush()
        assert store.get("kv", b"", [2]) is not None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_no_failing_call_ends_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    with open_store(tmp_path) as store:
        with monkeypatch.context() as patch:

            def full(*args: object, **options: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(disk.os, call, full)
            store.put("kv", b"", [1], sized(1000))
            store.flush()
        assert store.statistics().num_failed_writes == 1
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        store.put("kv", b"", [1], sized(1000))
        store.flush()
        assert same_bits(store.get("kv", b"", [1]), sized(1000))


def test_too_few_descriptors_delete_nothing(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object, **options: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with open_store(filled) as store:
        with monkeypatch.context() as patch:
            patch.setattr(disk.os, "open", none_left)
            assert store.get("state", b"salt", range(1, 22)) is None
        assert store.get("state", b"salt", range(1, 22)) is not None


def test_threads_side_by_side(tmp_path: Path) -> None:
    """Readers and writers of few keys under steady eviction: only right values, and the sums agree at the end."""
    size = file_bytes("kv", b"", 1, sized(2000))
    faults: list[str] = []

    def work(seed: int, store: DiskStore) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            token = chance.randint(1, 9)
            if chance.random() < 0.5:
                store.put("kv", b"", [token], sized(2000, token))
            else:
                got = store.get("kv", b"", [token])
                if got is not None and not same_bits(got, sized(2000, token)):
                    faults.append(f"token {token}")

    with open_store(tmp_path, max_bytes=4 * size) as store:
        threads = [threading.Thread(target=work, args=(seed, store)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.flush()
        counts = store.statistics()
        assert not faults
        assert counts.num_damaged == counts.num_failed_writes == 0
        assert counts.num_hits > 0
        assert counts.entry_bytes == folder_bytes(tmp_path) == 4 * size


# Sudden ends.


def kills(folder: Path, how: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.disk_kills", str(folder), how],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_before_every_single_call_to_the_system(tmp_path: Path) -> None:
    counts = kills(tmp_path / "store", "calls")
    assert counts["kills"] > 30
    assert counts["half_written"] > 0
    assert counts["entries"] > 0


def test_killed_at_random_moments(tmp_path: Path) -> None:
    counts = kills(tmp_path / "store", "moments")
    assert counts["kills"] == 60
    assert counts["half_written"] > 0
    assert counts["entries"] > 0
