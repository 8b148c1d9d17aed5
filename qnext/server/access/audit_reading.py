"""The audit log read back: whether its chain is whole, its records by filter, and their sums. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

FIRST = "0" * 64  # what the first line of a chain names as the one before


class AuditLine(NamedTuple):
    """One line of a log. `values` None: it is no JSON object, for instance because a crash has cut it off."""

    file: Path
    number: int  # from 1, in its file
    digest: str  # SHA-256 of its bytes
    values: dict[str, Any] | None

    @property
    def place(self) -> str:
        return f"{self.file}: line {self.number}"


def read_lines(path: Path) -> Iterator[AuditLine]:
    """The lines of `path` and of the files that it was rotated to, oldest first. Raises OSError."""
    for file in log_files(path):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                raw = line.rstrip(b"\n")
                yield AuditLine(file, number, hashlib.sha256(raw).hexdigest(), _object(raw))


def log_files(path: Path) -> list[Path]:
    """Oldest first. Whoever was killed between moving the file away and opening the next one left none of that name."""
    numbers = (int(found.suffix[1:]) for found in path.parent.glob(f"{path.name}.*") if found.suffix[1:].isdigit())
    files = [numbered(path, number) for number in sorted(numbers, reverse=True)]
    return files + ([path] if path.exists() or not files else [])


def numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


@dataclass(frozen=True)
class ChainCheck:
    """`faults` name file and line of each break, `error` the first. `last` is the hash of the last line.

    A chain cannot show that lines at its end were removed. A copy of `last` that is kept elsewhere can (`Anchor`).
    `is_from_start`: no line before the oldest was rotated away.
    """

    num_lines: int
    last: str
    is_from_start: bool
    faults: tuple[str, ...]

    @property
    def error(self) -> str | None:
        return self.faults[0] if self.faults else None


class Anchor(NamedTuple):
    """The hash of a line, as an earlier check printed it, and how many lines there were then, where that is known."""

    digest: str
    num_lines: int | None = None


def verify_chain(path: Path, anchor: Anchor | None = None) -> ChainCheck:
    """Check that each line follows the one before, and that the anchor's line is there, at its place or before it.

    The hash that the oldest line names is not checked: the line before it may have been rotated away.
    """
    previous, num_lines, anchored_at, is_from_start = None, 0, None, False
    faults: list[str] = []
    for line in read_lines(path):
        named = None if line.values is None else line.values.get("previous")
        if not isinstance(named, str):
            faults.append(f"{line.place} is damaged")
        elif previous is None:
            is_from_start = named == FIRST
        elif named != previous:
            faults.append(f"{line.place} does not follow the line before")
        previous = line.digest
        num_lines += 1
        if anchor is not None and line.digest == anchor.digest:
            anchored_at = num_lines
    if anchor is not None and (fault := _anchor_fault(path, anchor, anchored_at, is_from_start=is_from_start)):
        faults.append(fault)
    return ChainCheck(num_lines, previous or FIRST, is_from_start, tuple(faults))


def _anchor_fault(path: Path, anchor: Anchor, anchored_at: int | None, *, is_from_start: bool) -> str | None:
    if anchored_at is None:
        older = "" if is_from_start else ", or the files that held it were rotated away"
        return f"{path}: no line has the expected hash: lines at the end were taken away or changed{older}"
    wanted = anchor.num_lines
    if wanted is None or anchored_at == wanted or (anchored_at < wanted and not is_from_start):
        return None
    return f"{path}: the expected hash is that of line {anchored_at}, not of line {wanted}"


@dataclass(frozen=True)
class AuditFilter:
    """Which records are wanted: one field per condition, None for all. A new condition is a field and a line of
    `takes`.

    `since` and `until` are written as the log writes times; `until` is excluded.
    """

    key_id: str | None = None
    request_id: str | None = None
    route: str | None = None
    model: str | None = None
    since: str | None = None
    until: str | None = None
    is_refused: bool | None = None
    is_flagged: bool | None = None

    def takes(self, values: dict[str, Any]) -> bool:
        equal = ("key_id", "request_id", "route", "model")
        time, status = str(values.get("time", "")), values.get("status")
        return (
            all(getattr(self, name) in (None, values.get(name)) for name in equal)
            and (self.since is None or time >= self.since)
            and (self.until is None or time < self.until)
            and (self.is_refused is None or (isinstance(status, int) and status >= 400) == self.is_refused)
            and (self.is_flagged is None or bool(values.get("flagged")) == self.is_flagged)
        )


@dataclass
class RequestTotals:
    """Sums over records."""

    requests: int = 0
    refused: int = 0  # status 400 and above
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, values: dict[str, Any]) -> None:
        self.requests += 1
        self.refused += _number(values.get("status")) >= 400
        for name in ("prompt_tokens", "completion_tokens", "seconds"):
            setattr(self, name, getattr(self, name) + _number(values.get(name)))


TOTAL_COLUMNS = tuple(field.name for field in fields(RequestTotals))


def totals_by(name: str, records: Iterable[dict[str, Any]]) -> dict[str, RequestTotals]:
    """Sums by the value of a field, or by `day`; "-" stands for records without it. Largest numbers of tokens first."""
    totals: dict[str, RequestTotals] = {}
    for values in records:
        value = str(values.get("time", ""))[:10] if name == "day" else values.get(name)
        totals.setdefault("-" if value is None else str(value), RequestTotals()).add(values)
    return dict(sorted(totals.items(), key=lambda item: (-item[1].prompt_tokens - item[1].completion_tokens, item[0])))


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _number(value: object) -> Any:
    return value if isinstance(value, (int, float)) else 0
