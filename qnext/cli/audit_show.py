"""`qnext audit show`: the records of a server's audit log, and their sums."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from qnext.cli.flags.auditing import Log, as_logged, existing_log
from qnext.cli.flags.values import AsJson, option
from qnext.cli.terminal.text import columns

if TYPE_CHECKING:
    from qnext.server.access.audit_reading import AuditFilter, RequestTotals

_COLUMNS = ("time", "request_id", "key_id", "route", "status", "prompt_tokens", "completion_tokens", "seconds", "end")
_MOST_NAMED = 8
By = Literal["key_id", "model", "route", "status", "client", "day"]


@dataclass(frozen=True)
class FilterFlags:
    """Which records are shown; without any of them all are."""

    key: Annotated[str | None, option("of the key with this id: `qnext keys list`", metavar="ID")] = None
    request_id: Annotated[str | None, option("of this request: X-Request-Id of its answer", metavar="ID")] = None
    since: Annotated[str | None, option("from then on: 12h, 30d, or 2027-01-31 (UTC)", metavar="WHEN")] = None
    until: Annotated[str | None, option("before then, in the same forms", metavar="WHEN")] = None
    route: Annotated[str | None, option("of this route, as the log names it: /v1/chat/completions")] = None
    model: Annotated[str | None, option("of this model or adapter")] = None
    refused: Annotated[
        bool | None, option("only those with a status of 400 and above, or only others", "--refused/--answered")
    ] = None
    flagged: Annotated[
        bool | None,
        option("only those that people should look at, or only others", "--flagged/--unflagged"),
    ] = None

    def records(self) -> AuditFilter:
        from qnext.server.access.audit_reading import AuditFilter

        now = time.time()
        return AuditFilter(
            key_id=self.key,
            request_id=self.request_id,
            route=self.route,
            model=self.model,
            since=as_logged(self.since, "--since", now),
            until=as_logged(self.until, "--until", now),
            is_refused=self.refused,
            is_flagged=self.flagged,
        )


def command(
    log: Log,
    *,
    wanted: FilterFlags,
    totals: Annotated[By | None, option("sums by this field instead of records")] = None,
    last: Annotated[int | None, option("only the last so many", metavar="N", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Print records of an audit log, or their sums, the files it was rotated to included.

    Lines that cannot be read are named on stderr, by file and number. Whether lines were changed or removed:
    `qnext audit verify`.
    """
    from qnext.errors import warn
    from qnext.server.access.audit_reading import totals_by

    damaged: list[str] = []
    records: Iterable[dict[str, Any]] = _records(existing_log(log), wanted.records(), damaged)
    if last is not None:
        records = deque(records, maxlen=last)
    if totals is not None:
        _print_totals(totals, totals_by(totals, records), as_json)
    elif as_json:
        print(json.dumps({"file": str(log), "records": list(records)}, indent=2))
    else:
        for line in columns([_COLUMNS, *map(_row, records)]):
            print(line)
    if damaged:
        warn(f"{len(damaged)} lines cannot be read: {', '.join(damaged[:_MOST_NAMED])}")


def _records(log: Path, wanted: AuditFilter, damaged: list[str]) -> Iterator[dict[str, Any]]:
    """The places of lines that cannot be read are added to `damaged`. Raises CorruptCheckpoint where none can."""
    from qnext.errors import CorruptCheckpoint
    from qnext.server.access.audit_reading import read_lines

    has_read_any = False
    for line in read_lines(log):
        if line.values is None:
            damaged.append(line.place)
            continue
        has_read_any = True
        if wanted.takes(line.values):
            yield line.values
    if not has_read_any:
        raise CorruptCheckpoint(f"{log}: no line can be read, so it is no audit log")


def _row(values: dict[str, Any]) -> tuple[str, ...]:
    end = values.get("error_code") or values.get("finish_reason") or values.get("abort_phase")
    shown = {**values, "time": str(values.get("time", ""))[:19], "end": end}
    return tuple("-" if shown.get(name) is None else str(shown[name]) for name in _COLUMNS)


def _print_totals(name: str, found: dict[str, RequestTotals], as_json: bool) -> None:
    from qnext.server.access.audit_reading import TOTAL_COLUMNS

    if as_json:
        print(json.dumps({"by": name, "totals": {value: asdict(sums) for value, sums in found.items()}}, indent=2))
        return
    rows = [[value, *(f"{cell:.10g}" for cell in asdict(sums).values())] for value, sums in found.items()]
    for line in columns([[name, *TOTAL_COLUMNS], *rows]):
        print(line)
