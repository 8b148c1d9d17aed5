"""Keys: only their hashes are kept, and nothing but the exact secret of a living key is found."""

from __future__ import annotations

import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.server.access import keys as keys_module
from qnext.server.access.keys import MAX_SECRET_BYTES, SCOPES, USER_SCOPES, Key, KeyRing, KeyStore, default_path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "folder" / "keys.json")


def edit(store: KeyStore, **values: Any) -> None:
    """Change the first key's row as somebody with an editor would."""
    document = json.loads(store.path.read_text())
    document["keys"][0].update(values)
    store.path.write_text(json.dumps(document))


def test_a_key_is_found_by_its_secret_alone(store: KeyStore) -> None:
    key, secret = store.create("first", requests_per_minute=7, models=("a", "b"))
    other, other_secret = store.create("second", scopes=frozenset({"metrics"}), max_context=99)
    ring = KeyRing(store.path)
    assert ring.keys == (key, other) == store.keys()
    assert ring.find(secret) == ring.find(secret.encode()) == key
    assert ring.find(other_secret) == other != key
    assert secret.startswith("qn-") and len(secret) == 46
    assert (key.scopes, key.requests_per_minute, key.max_parallel) == (USER_SCOPES, 7, None)
    assert key.allows_model("a") and not key.allows_model("c") and other.allows_model("c")
    for wrong in (
        "",
        secret[:-1],
        secret + " ",
        " " + secret,
        secret + "\n",
        secret + "\0",
        secret.swapcase(),
        secret[3:],
        key.id,
        key.digest,
        "qn-" + "é" * 43,
        "' OR 1=1 --",
        "x" * 10**6,
        other.digest,
        secret + "é",
    ):
        assert ring.find(wrong) is None
        assert ring.find(wrong.encode()) is None
    assert ring.find("\ud800" * 40) is None  # no UTF-8 either


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.binary())
def test_no_other_text_is_a_key(wrong: str | bytes) -> None:
    assert KeyRing(plain=["secret-of-somebody"]).find(wrong) is None


def test_the_file_and_what_is_printed_hold_no_secret(store: KeyStore) -> None:
    key, secret = store.create("first")
    assert secret not in store.path.read_text() and secret[3:20] not in store.path.read_text()
    assert key.digest not in repr(key)
    assert [path.name for path in store.path.parent.iterdir() if "lock" not in path.name] == ["keys.json"]


@pytest.mark.parametrize("umask", [0, 0o077])
def test_only_the_owner_reads_the_file(store: KeyStore, umask: int) -> None:
    before = os.umask(umask)
    try:
        store.create("first")
        store.create("second")
    finally:
        os.umask(before)
    for path in store.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_as_many_comparisons_for_any_secret(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [store.create(f"key {number}")[1] for number in range(5)]
    ring, calls = KeyRing(store.path), []
    compare = keys_module.hmac.compare_digest
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda a, b: calls.append(1) or compare(a, b))
    for secret in (secrets[0], secrets[4], "qn-unknown"):
        calls.clear()
        ring.find(secret)
        assert len(calls) == 5


def test_a_long_secret_is_not_even_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = "x" * MAX_SECRET_BYTES
    ring = KeyRing(plain=[longest])
    assert ring.find(longest) is not None
    monkeypatch.setattr(keys_module.hashlib, "sha256", None)
    assert ring.find(longest + "x") is None and ring.find(b"x" * 10**6) is None
    with pytest.raises(TypeError):
        ring.find(longest)


def test_expired_revoked_and_rotated_keys(store: KeyStore) -> None:
    now = 1000.0
    key, secret = store.create("first", expires=2000)
    lasting, lasting_secret = store.create("second")
    ring = KeyRing(store.path, clock=lambda: now)
    assert ring.find(secret) == key
    now = 1999.9
    assert ring.find(secret) == key
    now = 2000.0
    assert ring.find(secret) is None and ring.find(lasting_secret) == lasting

    rotated, new_secret = store.rotate(lasting.id)
    assert rotated == replace(lasting, digest=rotated.digest) != lasting
    assert ring.find(lasting_secret) == lasting  # until the file is read again
    assert ring.reload() is None
    assert ring.find(lasting_secret) is None and ring.find(new_secret) == rotated

    store.revoke(lasting.id)
    assert ring.reload() is None
    assert ring.find(new_secret) is None and len(ring.keys) == 2
    with pytest.raises(UsageError, match="revoked"):
        store.rotate(lasting.id)
    with pytest.raises(UsageError, match="no key with the id 'nobody'"):
        store.revoke("nobody")


def test_a_bad_file_leaves_the_old_keys(store: KeyStore) -> None:
    key, secret = store.create("first")
    ring = KeyRing(store.path)
    good = store.path.read_text()
    for text in (
        "",
        "{",
        "[]",
        "null",
        good.replace('"version": 1', '"version": 2'),
        good.replace("revoked", "rvoked"),
    ):
        store.path.write_text(text)
        error = ring.reload()
        assert error is not None and str(store.path) in error and "\n" not in error
        assert ring.find(secret) == key
    store.path.unlink()
    assert "no such file" in (ring.reload() or "") and ring.find(secret) == key
    store.path.write_text(good)
    store.path.chmod(0o644)
    assert "chmod 600" in (ring.reload() or "")
    store.path.chmod(0o600)
    assert ring.reload() is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o606, 0o622, 0o660, 0o777])
def test_a_file_that_others_may_open_is_refused(store: KeyStore, mode: int) -> None:
    store.create("first")
    store.path.chmod(mode)
    with pytest.raises(UsageError, match=f"mode {mode:o}"):
        store.keys()
    with pytest.raises(UsageError, match=f"mode {mode:o}"):
        store.create("second")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_whose_file_it_may_be(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted secret: root's, and readable by the group that the server is in."""
    store.create("first")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    store.path.chmod(0o440)
    assert len(store.keys()) == 1
    for mode in (0o444, 0o460):
        store.path.chmod(mode)
        with pytest.raises(UsageError, match="open to other users"):
            store.keys()
    store.path.chmod(0o600)
    os.chown(store.path, 54321, 54321)
    with pytest.raises(UsageError, match="belongs to another user"):
        store.keys()


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="is no file"):
            KeyStore(path).keys()
    with pytest.raises(UsageError, match="no such file"):
        KeyStore(tmp_path / "nothing").keys()
    with pytest.raises(UsageError, match="no such file"):
        KeyStore(tmp_path / "nothing").revoke("00000000")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", "xyz"),
        ("id", "ABCDEF01"),
        ("digest", "00"),
        ("digest", 5),
        ("name", ""),
        ("name", "a\nb"),
        ("name", None),
        ("created", -1),
        ("created", True),
        ("created", 1.5),
        ("expires", "tomorrow"),
        ("expires", 2**60),
        ("scopes", []),
        ("scopes", ["root"]),
        ("scopes", "admin"),
        ("scopes", [["admin"]]),
        ("models", []),
        ("models", [""]),
        ("models", [1]),
        ("requests_per_minute", 0),
        ("tokens_per_minute", -5),
        ("max_parallel", 1.0),
        ("max_context", True),
        ("revoked", 0),
        ("revoked", None),
        ("unknown", 1),
    ],
)
def test_a_wrong_value_is_named(store: KeyStore, name: str, value: object) -> None:
    store.create("first")
    edit(store, **{name: value})
    with pytest.raises(UsageError, match=rf"keys\.json: keys\[0\]: .*{name}"):
        store.keys()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(name=st.sampled_from(sorted(Key.__dataclass_fields__)), value=JSON, whole=JSON)
def test_any_file_is_read_or_refused_in_one_line(store: KeyStore, name: str, value: object, whole: object) -> None:
    store.path.unlink(missing_ok=True)
    store.create("first")
    edit(store, **{name: value})
    for text in (store.path.read_text(), json.dumps(whole), json.dumps({"version": 1, "keys": whole})):
        store.path.write_text(text)
        try:
            assert len(store.keys()) <= 1
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) < 600


def test_two_keys_are_never_mistaken(store: KeyStore) -> None:
    key, secret = store.create("first")
    document = json.loads(store.path.read_text())
    for change, word in (({"id": "00000000"}, "digest"), ({"digest": "0" * 64}, "id")):
        store.path.write_text(json.dumps({**document, "keys": [key.as_dict(), {**key.as_dict(), **change}]}))
        with pytest.raises(UsageError, match=f"same {word}"):
            store.keys()
    store.path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="same digest") as caught:
        KeyRing(store.path, plain=[secret])
    assert secret not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create("first")
    before = store.path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(os, name, fail)
            store.create("second")
        assert store.path.read_bytes() == before
        assert len(list(store.path.parent.iterdir())) == 2  # the file and its lock


def test_a_link_stays_a_link(store: KeyStore, tmp_path: Path) -> None:
    store.create("first")
    (tmp_path / "link.json").symlink_to(store.path)
    KeyStore(tmp_path / "link.json").create("second")
    assert (tmp_path / "link.json").is_symlink() and len(store.keys()) == 2


def test_changes_at_the_same_time_are_all_kept(store: KeyStore) -> None:
    def create(thread: int) -> None:
        for number in range(4):
            KeyStore(store.path).create(f"{thread} {number}")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [key.name for key in KeyRing(store.path).keys]
    assert sorted(names) == [f"{thread} {number}" for thread in range(5) for number in range(4)]


def test_when_a_server_is_open(store: KeyStore) -> None:
    assert KeyRing().is_open and KeyRing().find("anything") is None
    assert not KeyRing(plain=["a-key"]).is_open
    _, secret = store.create("only")
    store.path.write_text('{"version": 1, "keys": []}')
    ring = KeyRing(store.path)
    assert not ring.is_open and ring.find(secret) is None  # nobody gets in, rather than everybody


def test_plain_keys() -> None:
    ring = KeyRing(plain=["one-key", "both", "one-key"], admin=["both", "boss"])
    found = {secret: ring.find(secret) for secret in ("one-key", "both", "boss")}
    assert len(ring.keys) == 3
    assert [found[secret].scopes for secret in found] == [USER_SCOPES, set(SCOPES), set(SCOPES)]  # type: ignore[union-attr]
    assert "admin" not in USER_SCOPES
    assert len({key.id for key in ring.keys}) == 3 and all(len(key.id) == 8 for key in ring.keys)
    assert KeyRing(plain=["one-key"]).keys[0].id == ring.keys[0].id  # the same after a restart
    assert ring.reload() is None and len(ring.keys) == 3
    for wrong in ("", "with space", "naïve-key", "line\nbreak", "x" * 257):
        with pytest.raises(UsageError, match="visible ASCII") as caught:
            KeyRing(plain=[wrong])
        assert not wrong or wrong not in str(caught.value)


def test_salts_part_keys_and_outlast_the_process(store: KeyStore) -> None:
    key, _ = store.create("first")
    other, _ = store.create("second")
    ring = KeyRing(store.path)
    salt = ring.cache_salt(key)
    assert len(salt) == 64 and key.id not in salt
    assert len({salt, ring.cache_salt(other), ring.cache_salt(None)}) == 3
    assert KeyRing(store.path).cache_salt(key) == salt, "what is on disk is found after a restart"
    store.rotate(key.id)
    ring.reload()
    assert ring.cache_salt(ring.keys[0]) != salt, "nobody who has the old secret shares with the new one"


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_path() == tmp_path / "qnext" / "keys.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_path() == Path("/home/somebody/.config/qnext/keys.json")
