"""API keys: a file that holds only their hashes, and the ring that the server asks. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qnext.errors import UsageError
from qnext.files import write_file

SCOPES = ("inference", "tokenize", "metrics", "admin")
USER_SCOPES = frozenset({"inference", "tokenize"})  # nothing that shows other keys' requests
MAX_SECRET_BYTES = 256
MAX_KEYS = 4096  # a look-up compares with every key
_MAX_FILE_BYTES = 16 * 2**20
_VERSION = 1


@dataclass(frozen=True)
class Key:
    """What a key may do. Times are UNIX seconds. A limit of None is no limit. `models` of None means every model."""

    id: str  # public, 8 hex digits
    name: str
    digest: str = field(repr=False)  # SHA-256 of the secret, hex
    created: int
    expires: int | None = None
    scopes: frozenset[str] = USER_SCOPES
    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_parallel: int | None = None
    max_context: int | None = None
    revoked: bool = False

    def state(self, now: float) -> str:
        """active, expired or revoked."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"

    def allows_model(self, model: str) -> bool:
        return self.models is None or model in self.models

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scopes": sorted(self.scopes), "models": self.models and list(self.models)}


class KeyStore:
    """Keys in one JSON file. Every change writes the whole file, flushes it and renames it into place, under a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keys(self) -> tuple[Key, ...]:
        """Raises UsageError for a file that is missing, open to other users, malformed or of another version."""
        return _parse(_read_private(self.path), self.path)

    def create(self, name: str, **limits: Any) -> tuple[Key, str]:
        """Make a key and its secret, which is not stored. `limits` are fields of Key. The file and its folder are made
        if needed."""
        secret = _new_secret()
        with self._changing(may_create=True) as keys:
            key_id = _new_id({key.id for key in keys})
            key = _parse_key(Key(key_id, name, _digest(secret), int(time.time()), **limits).as_dict(), "key")
            if len(keys) >= MAX_KEYS:
                raise UsageError(f"{self.path} holds {len(keys)} keys, no more than {MAX_KEYS} are allowed")
            keys.append(key)
        return key, secret

    def revoke(self, key_id: str) -> Key:
        return self._replace(key_id, revoked=True)

    def rotate(self, key_id: str) -> tuple[Key, str]:
        """A new secret for the same key. The old secret is invalid from the next reload on."""
        secret = _new_secret()
        return self._replace(key_id, digest=_digest(secret)), secret

    def find(self, key_id: str) -> Key:
        keys = self.keys()
        return keys[_position(keys, key_id, self.path)]

    def _replace(self, key_id: str, **changes: Any) -> Key:
        with self._changing() as keys:
            position = _position(keys, key_id, self.path)
            if keys[position].revoked:
                raise UsageError(f"the key {key_id} in {self.path} is revoked")
            keys[position] = key = replace(keys[position], **changes)
        return key

    @contextmanager
    def _changing(self, *, may_create: bool = False) -> Iterator[list[Key]]:
        if may_create:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        elif not self.path.exists():
            raise UsageError(f"{self.path}: there is no such file of keys")
        # The lock is a file of its own: the file of keys is another one after every change.
        target = self.path.resolve()
        lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(self.keys()) if self.path.exists() else []
            yield keys
            values = {"version": _VERSION, "keys": [key.as_dict() for key in keys]}
            # An earlier file was not open to others, or it would not have been read.
            mode = None if self.path.exists() else 0o600
            write_file(self.path, json.dumps(values, indent=1) + "\n", mode=mode)
        finally:
            os.close(lock)


class KeyRing:
    """The keys that a server accepts: those of a file, and plain ones from the command line.

    A ring without a file and without plain keys is open: the server accepts every request. A file without a single key
    accepts nobody. `clock` gives UNIX seconds.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        plain: Iterable[str] = (),
        admin: Iterable[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`plain` keys may use the model. `admin` keys have all scopes. Neither has limits. Raises UsageError.

        A single plain key without a file may also read metrics.
        """
        self._store = None if file is None else KeyStore(file)
        self._clock = clock
        self._plain = _plain_keys(plain, admin, int(clock()), is_all=file is None)
        self._version = self._file_version()
        self._keys = self._load()
        self._was_shared = len(self._keys) > 1

    @property
    def is_open(self) -> bool:
        return self._store is None and not self._plain

    @property
    def has_one_user(self) -> bool:
        """Whether there is one key and never was another, counting revoked keys. Then all requests belong to that
        key."""
        return len(self._keys) == 1 and not self._was_shared

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(key for _, key in self._keys)

    def find(self, secret: str | bytes) -> Key | None:
        """The key with this secret, unless it has expired or was revoked."""
        found = self.recognise(secret)
        return found if found is not None and found.state(self._clock()) == "active" else None

    def recognise(self, secret: str | bytes) -> Key | None:
        """The key with this secret, also an expired or revoked one: for the audit log.

        The hash is compared with that of every key, so a wrong secret takes as long as a right one.
        """
        if not 0 < len(secret) <= MAX_SECRET_BYTES or not secret.isascii():
            return None
        digest = hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()
        found = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def reload(self) -> str | None:
        """Read the file again. Where it cannot be read, the old keys stay valid, and the result says in one line
        why."""
        try:
            self._keys = self._load()
            self._was_shared = self._was_shared or len(self._keys) > 1
        except UsageError as error:
            return str(error)
        except OSError as error:
            return f"{self._store and self._store.path}: {error.strerror or error}"
        return None

    def reload_if_changed(self) -> str | None:
        """`reload` where the file is another one than before, for servers that no signal reaches."""
        version = self._file_version()
        if version is None or version == self._version:
            return None
        self._version = version
        return self.reload()

    def _file_version(self) -> tuple[int, int] | None:
        if self._store is None:
            return None
        try:
            found = self._store.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino

    def cache_salt(self, key: Key | None) -> str:
        """The salt of a key's cached prefixes, which separates them from those of other keys; empty on an open server.

        It is made from the hash of the secret. So it is the same after a restart, and prefixes on disk are found again.
        A rotated key has another salt. Nobody can compute the salt from the key's id.
        """
        if key is None:
            return ""
        return hmac.new(bytes.fromhex(key.digest), b"prefix cache", hashlib.sha256).hexdigest()

    def _load(self) -> tuple[tuple[bytes, Key], ...]:
        keys = (*self._plain, *(() if self._store is None else self._store.keys()))
        for attribute in ("digest", "id"):
            values = [getattr(key, attribute) for key in keys]
            if len(set(values)) < len(values):
                raise UsageError(f"two of the keys given, in the file or beside it, have the same {attribute}")
        return tuple((bytes.fromhex(key.digest), key) for key in keys)


def default_path() -> Path:
    """~/.config/qnext/keys.json, or the same below XDG_CONFIG_HOME."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "qnext" / "keys.json"


def _plain_keys(plain: Iterable[str], admin: Iterable[str], now: int, *, is_all: bool) -> tuple[Key, ...]:
    # Keyed by the hash: a key that was given twice is one key, and what is given as admin is admin.
    found = {}
    for name, scopes, given in (("plain", USER_SCOPES, plain), ("admin", frozenset(SCOPES), admin)):
        for secret in given:
            if not 0 < len(secret) <= MAX_SECRET_BYTES or not all("!" <= letter <= "~" for letter in secret):
                raise UsageError(f"an API key is 1 to {MAX_SECRET_BYTES} visible ASCII characters without spaces")
            digest = _digest(secret)
            found[digest] = Key(digest[:8], name, digest, now, scopes=scopes)
    if is_all and len(found) == 1:
        return tuple(replace(key, scopes=key.scopes | {"metrics"}) for key in found.values())
    return tuple(found.values())


def _new_secret() -> str:
    return "qn-" + secrets.token_urlsafe(32)


def _new_id(taken: set[str]) -> str:
    while (key_id := secrets.token_hex(4)) in taken:
        pass
    return key_id


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _position(keys: Sequence[Key], key_id: str, path: Path) -> int:
    for position, key in enumerate(keys):
        if key.id == key_id:
            return position
    raise UsageError(f"{path} has no key with the id {key_id[:40]!r}")


# ---- the file ----


def _read_private(path: Path) -> bytes:
    try:
        # A pipe must not keep the server waiting; what it is shows from the open file, so nobody can swap it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file of keys") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is no file")
        user = os.geteuid()
        if user and found.st_uid not in (user, 0):
            raise UsageError(f"{path} belongs to another user, who could add keys")
        # A mounted secret is root's and reaches the server through its group. Root itself may use anybody's file.
        forbidden = 0o077 if found.st_uid == user else 0o037
        if found.st_mode & forbidden:
            raise UsageError(f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):o}): chmod 600 it")
        if found.st_size > _MAX_FILE_BYTES:
            raise UsageError(f"{path} is larger than a file of {MAX_KEYS} keys can be")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(_MAX_FILE_BYTES)
    finally:
        os.close(fd)


def _parse(raw: bytes, path: Path) -> tuple[Key, ...]:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no JSON") from None
    if not isinstance(values, dict) or "version" not in values:
        raise UsageError(f"{path} is no file of keys")
    version = values["version"]
    if type(version) is not int or version != _VERSION:
        raise UsageError(f"{path} has the version {str(version)[:20]!r}, and this program reads version {_VERSION}")
    rows = values.get("keys")
    if set(values) != {"version", "keys"} or not isinstance(rows, list) or len(rows) > MAX_KEYS:
        raise UsageError(f"{path}: expected `version` and a list `keys` of at most {MAX_KEYS}")
    keys = tuple(_parse_key(row, f"{path}: keys[{index}]") for index, row in enumerate(rows))
    for attribute in ("id", "digest"):
        if len({getattr(key, attribute) for key in keys}) < len(keys):
            raise UsageError(f"{path}: two keys have the same {attribute}")
    return keys


def _parse_key(row: object, where: str) -> Key:
    names = {field.name for field in fields(Key)}
    if not isinstance(row, dict) or set(row) != names:
        wrong = names ^ set(row) if isinstance(row, dict) else names
        raise UsageError(f"{where}: missing or unknown: {', '.join(sorted(repr(name)[:40] for name in wrong)[:5])}")
    for name, is_right, wanted in _CHECKS:
        if not is_right(row[name]):
            raise UsageError(f"{where}: {name} must be {wanted}")
    models = row["models"]
    return Key(**{**row, "scopes": frozenset(row["scopes"]), "models": models and tuple(models)})


def _is_hex(length: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and len(value) == length and set(value) <= set("0123456789abcdef")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**53


def _or_none(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_right(value)


def _is_list(value: object, is_right: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 256 and all(map(is_right, value))


_LIMIT = (_or_none(_is_count), "a whole number above 0, or null")
_CHECKS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("id", _is_hex(8), "8 hex digits"),
    ("name", _is_text, "1 to 128 printable characters"),
    ("digest", _is_hex(64), "a SHA-256 in hex"),
    ("created", _is_count, "a UNIX time"),
    ("expires", _or_none(_is_count), "a UNIX time or null"),
    ("scopes", lambda value: _is_list(value, SCOPES.__contains__), f"a list of {', '.join(SCOPES)}"),
    ("models", _or_none(lambda value: _is_list(value, _is_text)), "a list of names or null"),
    ("requests_per_minute", *_LIMIT),
    ("tokens_per_minute", *_LIMIT),
    ("max_parallel", *_LIMIT),
    ("max_context", *_LIMIT),
    ("revoked", lambda value: isinstance(value, bool), "true or false"),
)
