"""Moments that a flag names: a span from now, or a day."""

from __future__ import annotations

import re
from datetime import datetime, timezone

from qnext.errors import UsageError

_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def moment(text: str, flag: str, now: float, *, is_past: bool) -> int:
    """UNIX time of a span before or after `now`, or of when a day begins (UTC). Raises UsageError naming the flag."""
    if span := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
        seconds = int(span[1]) * _SECONDS[span[2]]
        return int(now) + (-seconds if is_past else seconds)
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())
    except ValueError:
        raise UsageError(
            f"{flag} {text[:40]!r} is neither a span such as 30d or 12h nor a day such as 2027-01-31"
        ) from None
