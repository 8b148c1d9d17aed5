"""The audit log: one JSON line for each request, without any content, in a file that only grows. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qnext.server.access.audit_reading import FIRST, numbered

_MAX_TEXT = 256  # characters of a field: a client chooses some of them
_MAX_LINE_BYTES = 65_536


@dataclass(frozen=True)
class AuditRecord:
    """One request, or one action of an administrator.

    `route` is the pattern of the request's route, or of the closest route; None where there is none. `method` is None
    where it could not be read. `seconds` is the whole time of the request. `trace` says what its answers came from.
    `moderation` is what became of its texts, `categories` are the reasons. `flagged`: people should look at it.
    """

    request_id: str
    route: str | None
    method: str | None
    status: int
    key_id: str | None = None
    client: str | None = None
    model: str | None = None
    params_hash: str | None = None
    system_fingerprint: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    seconds: float | None = None
    stream: bool = False
    abort_phase: str | None = None
    error_code: str | None = None
    trace: Mapping[str, Any] | None = None
    moderation: str | None = None
    categories: tuple[str, ...] = ()
    flagged: bool = False


class AuditLog:
    """Appends one line per record, with one write. Only the owner of the file may read it.

    At `max_bytes` the file becomes `path.1`, that one `path.2`, up to `path.keep`. With `chain` every line has the
    SHA-256 of the line before it, across files and restarts. A write that fails loses its line, is counted in
    `num_failed`, and is logged the first time; no request fails because of it. `is_failing`: the newest line was lost.
    Only one thread may use it. No other process may write to the same file.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 64 * 2**20,
        keep: int = 8,
        chain: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises OSError when the file cannot be opened."""
        self.path = path
        self.num_failed = 0
        self.is_failing = False
        self._max_bytes = max_bytes
        self._keep = keep
        self._has_chain = chain
        self._clock = clock
        self._fd, self._size, self._rotate_at, self._previous, self._is_torn = -1, 0, max_bytes, FIRST, False
        self._open()

    def write(self, record: AuditRecord) -> None:
        try:
            line = self._line(record)
            if self._size and self._size + len(line) + 1 > self._rotate_at:
                self._rotate()
            self._append(line)
            self.is_failing = False
        except (OSError, ValueError, TypeError) as error:
            self.num_failed += 1
            self.is_failing = True
            if self.num_failed == 1:
                self._complain("loses lines", error)

    def reopen(self) -> None:
        """Open the path again, after someone moved the file. Raises OSError; then the old file is still used."""
        old, previous = self._fd, self._previous
        try:
            self._open()
        except OSError:
            self._fd = old
            raise
        if self._size == 0:
            self._previous = previous
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _line(self, record: AuditRecord) -> bytes:
        moment = datetime.fromtimestamp(self._clock(), timezone.utc)
        values: dict[str, Any] = {"time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
        for name, value in asdict(record).items():
            values[name] = value[:_MAX_TEXT] if isinstance(value, str) else value
        if self._has_chain:
            values["previous"] = self._previous
        return json.dumps(values, allow_nan=False, separators=(",", ":")).encode("ascii")  # all but ASCII is escaped

    def _append(self, line: bytes) -> None:
        # What a full disk cut off ends before the next line begins.
        data = (b"\n" if self._is_torn else b"") + line + b"\n"
        num_written = os.write(self._fd, data)
        if num_written < len(data):
            self._take_back(num_written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += num_written
        self._is_torn, self._previous = False, _sha256(line)

    def _take_back(self, num_written: int) -> None:
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - num_written)
        except OSError:  # a file that may only be appended to
            self._size += num_written
            last = _last_line(self.path)
            self._previous, self._is_torn = last.digest, last.is_torn

    def _rotate(self) -> None:
        try:
            self._move_away()
        except OSError as error:
            # Not again with the next line: each try pushes the oldest file out.
            self._rotate_at = self._size + self._max_bytes
            self._complain("grows, it cannot be moved away", error)

    def _move_away(self) -> None:
        for number in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(numbered(self.path, number), numbered(self.path, number + 1))
        with suppress(FileNotFoundError):  # moved before, when the new one could not be opened
            if self._keep:
                os.replace(self.path, numbered(self.path, 1))
            else:
                os.unlink(self.path)
        self.reopen()

    def _complain(self, what: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        logging.getLogger("qnext.server.audit").error("the audit log %s %s: %s", self.path, what, reason)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._fd = os.open(self.path, flags, 0o600)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            raise OSError(errno.EINVAL, "is no file", str(self.path))
        os.fchmod(self._fd, 0o600)  # also one that was there before
        self._size, self._rotate_at = found.st_size, self._max_bytes
        last = _last_line(self.path if self._size or not self._has_chain else numbered(self.path, 1))
        self._previous, self._is_torn = last.digest, last.is_torn and self._size > 0


@dataclass(frozen=True)
class _LastLine:
    digest: str
    is_torn: bool  # without an end


def _last_line(path: Path) -> _LastLine:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MAX_LINE_BYTES))
            tail = file.read()
    except FileNotFoundError:
        tail = b""
    if not tail:
        return _LastLine(FIRST, False)
    is_torn = not tail.endswith(b"\n")
    return _LastLine(_sha256(tail.removesuffix(b"\n").rpartition(b"\n")[2]), is_torn)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- keys in other logs ----

_HIDDEN = "<redacted>"
_KEY_LETTER = r"(?:[A-Za-z0-9_-]|%2[dD]|%5[fF])"
_PATTERNS = (
    # a key by its form: a whole one anywhere, a piece of one where a word may begin, also behind %20 and the like
    re.compile(rf"(?:qn|sk)(?:-|%2[dD]){_KEY_LETTER}{{32,}}"),
    re.compile(rf"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f][0-9A-Fa-f]))(?:qn|sk)(?:-|%2[dD]){_KEY_LETTER}{{8,}}"),
    # the value of a header or a parameter, whatever it looks like; also in JSON and in the repr of dicts and pairs
    re.compile(r"(?P<kept>bearer(?:\s|%20|\+)+)[^\s\"',;&]+", re.IGNORECASE),
    re.compile(
        r"(?P<kept>(?:x[-_]api[-_]key|api[-_]?key|access[-_]token|authorization)"
        r"\\*[\"']?\s*(?:[:=,]|%3[ad])\s*[\[(]?(?:b(?=[\\\"']))?\\*[\"']?"
        r"(?:(?:bearer|basic)(?:\s|%20|\+)+)?)[^\s\"',;&\\]+",
        re.IGNORECASE,
    ),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without `qn-...`, `sk-...`, values of authorization and x-api-key, and the given secrets."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(lambda found: (found.groupdict().get("kept") or "") + _HIDDEN, text)
    return text


class RedactingFilter(logging.Filter):
    """Redacts message, arguments, extra fields, exception and stack of every record; never drops one.

    It belongs on handlers: the filters of a logger do not see what its children log. `secrets` are keys that were
    given in plain text and may have any form.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._secrets = tuple(sorted(secrets, key=len, reverse=True))

    def filter(self, record: logging.LogRecord) -> bool:
        # Arguments one by one first: formatters read them, and a message that does not fit them is printed with them.
        if isinstance(record.args, tuple):
            record.args = tuple(map(self._clean, record.args))
        elif isinstance(record.args, Mapping):
            record.args = {name: self._clean(value) for name, value in record.args.items()}
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            message = str(record.msg)
        if (cleaned := self._redact(message)) != message:
            record.msg, record.args = cleaned, ()
        if record.exc_info:
            record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        for name, value in vars(record).items():
            if name not in _KEPT and isinstance(value, str):
                setattr(record, name, self._redact(value))
        return True

    def _redact(self, text: str) -> str:
        return redact(text, self._secrets)

    def _clean(self, value: object) -> object:
        """The text without keys; the value itself where its text holds none, since a formatter may want the type."""
        if isinstance(value, (int, float)) or value is None:
            return value
        shown = (str(value), repr(value))
        return value if all(self._redact(text) == text for text in shown) else self._redact(shown[0])


_KEPT = {"msg", "name", "levelname", "pathname", "filename", "module", "funcName", "threadName", "processName"}
