"""The result of a check: a line for people, numbers for programs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

FindingStatus = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """`advice` is one line where the status is not ok."""

    name: str
    status: FindingStatus
    text: str
    advice: str = ""
    data: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
