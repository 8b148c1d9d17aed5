"""A damaged, foreign or failing disk costs entries, and never an error or a wrong bit."""

from __future__ import annotations

import errno
import json
import os
import resource
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.engine.storage.disk_entry import PREFIX, PrefixHasher, token_bytes
from qnext.engine.storage.disk_files import ENTRY_SUFFIX, PARTIAL_SUFFIX
from qnext.engine.storage.disk_folder import LOCK_FILE
from tests.engine.disk_stores import MODEL, entries, file_bytes, open_store, random_tensors, same_bits, sized
from tests.forked import run

ROOT = Path(__file__).parents[2]


def test_an_entry_of_another_version_of_the_form_is_deleted(filled: Path) -> None:
    (path,) = entries(filled)
    data = bytearray(path.read_bytes())
    data[8:12] = (1).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    check_that_nothing_is_used(filled)


def positions(path: Path) -> list[tuple[str, int]]:
    """A byte of each region: every byte of the prefix, some of the header, tokens, gap, tensors and the last."""
    data = path.read_bytes()
    header_bytes = PREFIX.unpack(data[: PREFIX.size])[2]
    body = PREFIX.size + header_bytes
    return [
        *(("prefix", at) for at in range(PREFIX.size)),
        *(("header", at) for at in range(PREFIX.size, body, 17)),
        ("tokens", body),
        ("tokens", body + 83),
        ("gap", body + 90),
        ("tensor", body + 128),
        ("last", len(data) - 1),
        *(("any", at) for at in range(body, len(data), 61)),
    ]


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
        "fingerprint": MODEL.hex(),
        "kind": "state",
        "salt": "",
        "num_tokens": 3,
        "tensors": [["x", "int8", [2, 2]]],
    }
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

            patch.setattr(os, call, full)
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
            patch.setattr(os, "open", none_left)
            assert store.get("state", b"salt", range(1, 22)) is None
        assert store.get("state", b"salt", range(1, 22)) is not None


def kills(folder: Path, how: str) -> dict[str, int]:
    done = run(["-m", "tests.engine.disk_kills", folder, how], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_before_every_single_call_to_the_system(tmp_path: Path) -> None:
    counts = kills(tmp_path / "store", "calls")
    assert counts["kills"] > 30
    assert counts["half_written"] > 0
    assert counts["entries"] > 0


def test_killed_at_random_moments(tmp_path: Path) -> None:
    counts = kills(tmp_path / "store", "moments")
    assert counts["kills"] >= 30
    assert counts["half_written"] > 0
    assert counts["entries"] > 0
