"""The disk store: what comes back is bit for bit what was put, or nothing."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qnext.engine.storage.disk import DiskStore
from qnext.engine.storage.disk_entry import PrefixHasher, make_fingerprint
from qnext.engine.storage.disk_folder import LOCK_FILE
from qnext.errors import UsageError
from tests.engine.disk_stores import (
    entries,
    file_bytes,
    folder_bytes,
    hold_writer,
    open_store,
    random_tensors,
    same_bits,
    sized,
)


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
    monkeypatch.setattr(PrefixHasher, "names", lambda self, tokens, lengths: ((length, "0" * 40) for length in lengths))
    with open_store(tmp_path) as store:
        store.put("kv", b"a", [1, 2], sized(10, 1))
        for _ in ("in the queue or on disk", "on disk"):
            assert store.get("kv", b"a", [1, 3]) is None
            assert store.get("kv", b"b", [1, 2]) is None
            assert store.get("state", b"a", [1, 2]) is None
            assert same_bits(store.get("kv", b"a", [1, 2]), sized(10, 1))
            store.flush()
        assert store.statistics().num_damaged == 0


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
    open_store(tmp_path).close()


def test_a_closed_store_is_empty_and_takes_nothing(filled: Path) -> None:
    store = open_store(filled)
    store.close()
    store.close()
    store.flush()
    assert not store.put("kv", b"", [1], sized(1))
    assert store.get("state", b"salt", range(1, 22)) is None
    assert store.longest("state", b"salt", range(1, 22), limit=21) == 0
    assert len(entries(filled)) == 1


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
