"""The files of a batch in OpenAI's form: requests line by line, and answers that a later run continues."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from qnext.errors import UsageError
from qnext.files import append, new_file, remove_partials

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MAX_LINE_BYTES = 16 << 20
_MAX_ID = 512  # characters of a custom_id
_BEGIN = b'{"id":"batch_req_'  # of every line that is written here


@dataclass(frozen=True)
class BatchRequest:
    """A line that holds a valid request."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that holds no valid request, and the reason."""

    custom_id: str | None
    code: str
    message: str


def input_lines(name: str) -> Iterator[bytes]:
    """Lines of a file or, for `-`, of standard input, each cut off after MAX_LINE_BYTES. Raises OSError."""
    if name == "-":
        yield from _bounded_lines(sys.stdin.buffer)
        return
    with open(name, "rb") as file:
        yield from _bounded_lines(file)


def _bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return


def read_requests(lines: Iterable[bytes]) -> Iterator[BatchRequest | BadLine]:
    """Each line as a request, or as what is wrong with it. Only the first of equal custom_ids counts. Empty lines are
    ignored."""
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = _request(line, number)
        if isinstance(entry, BatchRequest):
            if entry.custom_id in seen:
                entry = BadLine(entry.custom_id, "duplicate_custom_id", f"line {number}: this custom_id came before")
            else:
                seen.add(entry.custom_id)
        yield entry


def _request(line: bytes, number: int) -> BatchRequest | BadLine:
    def bad(code: str, message: str) -> BadLine:
        return BadLine(custom_id if isinstance(custom_id, str) else None, code, f"line {number}: {message}")

    custom_id: Any = None
    if len(line) > MAX_LINE_BYTES:
        return bad("line_too_long", f"longer than {MAX_LINE_BYTES} bytes")
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError:
        return bad("invalid_json", "not valid JSON")
    if not isinstance(values, dict):
        return bad("invalid_request", "not a JSON object")
    custom_id, method, url, body = (values.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        custom_id = None
        return bad("invalid_custom_id", f"custom_id must be a text of 1 to {_MAX_ID} characters")
    if method != "POST":
        return bad("invalid_method", "method must be POST")
    if url not in URLS:
        return bad("invalid_url", f"url must be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        return bad("invalid_request", "body must be an object")
    if body.get("stream"):
        return bad("invalid_request", "an answer in a batch is not streamed")
    return BatchRequest(custom_id, url, body)


class BatchOutput:
    """The file of answers. Each answer is one line, written with one write. `answered` holds the custom_ids that are
    done.

    An existing file is continued: lines with answers stay, and failed requests and a torn last line are removed. A new
    file is removed again where an error ends its context before the first line. Raises UsageError for a file that is no
    output of a batch, or that another run writes to.
    """

    def __init__(self, name: str) -> None:
        self.answered: set[str] = set()
        self._name = name
        self._file: int | None = None
        self._is_new = name != "-" and not os.path.lexists(name)
        if name != "-":
            self._file = self._open(Path(name))

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            if error is not None and self._is_new and not os.fstat(self._file).st_size:
                os.unlink(self._name)
            os.close(self._file)

    def write(self, document: dict[str, Any]) -> None:
        line = orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
        if self._file is None:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        else:
            append(self._file, line, path=self._name)

    def _open(self, path: Path) -> int:
        if path.exists() and not path.is_file():  # a pipe: nothing to go on from
            return os.open(path, os.O_WRONLY)
        old = _lock(path)
        remove_partials(path.parent, path.name)
        try:
            ids = [custom_id for _, custom_id in _old_lines(path)]
            self.answered = {custom_id for custom_id in ids if custom_id is not None}
            return old if len(ids) == len(self.answered) else _without_rest(path, old)
        except BaseException:
            os.close(old)
            raise


def _without_rest(path: Path, old: int) -> int:
    """Put a file of the lines that stay in the place of `path`; returns it, locked, and closes `old`."""
    with new_file(path) as file:
        for line, custom_id in _old_lines(path):
            if custom_id is not None:
                file.write(line)
        new = os.dup(file.fileno())  # the lock of the new file goes with it
    fcntl.fcntl(new, fcntl.F_SETFL, os.O_APPEND)
    os.close(old)
    return new


def _old_lines(path: Path) -> Iterator[tuple[bytes, str | None]]:
    """(line, the custom_id that it answers) of an earlier run; None for a line that is not to stay."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            is_torn = not line.endswith(b"\n")
            try:
                document = orjson.loads(line)
                custom_id, response = document["custom_id"], document["response"]
                is_answered = response is not None and response["status_code"] == 200
            except (orjson.JSONDecodeError, KeyError, TypeError):
                if not (is_torn and (line.startswith(_BEGIN) or _BEGIN.startswith(line))):
                    message = f"{path}: line {number} is no line of a batch's output; give another -o"
                    raise UsageError(message) from None
                is_answered, custom_id = False, None
            if not is_answered or is_torn or not isinstance(custom_id, str) or custom_id in seen:
                yield line, None
            else:
                seen.add(custom_id)
                yield line, custom_id


def _lock(path: Path) -> int:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise UsageError(f"{path}: another run writes to it") from None
    return file
