"""`qnext audit trace`: what one answer came from, and whether a folder is the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.flags.auditing import Log, existing_log
from qnext.cli.flags.values import AsJson, option
from qnext.cli.terminal.text import columns

if TYPE_CHECKING:
    from qnext.session.tracing import Difference

_SHOWN = ("time", "request_id", "key_id", "model", "route", "prompt_tokens", "completion_tokens", "system_fingerprint")


def command(
    log: Log,
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="X-Request-Id of the answer; `last` is the newest")
    ],
    *,
    model: Annotated[str | None, option("compare this folder with the one that answered", metavar="FOLDER")] = None,
    adapter: Annotated[Path | None, option("and this adapter", metavar="FOLDER")] = None,
    as_json: AsJson = False,
) -> None:
    """Print all that an answer depended on beside its prompt: short names of model, tokenizer, chat template and
    adapter, the version, the machine's arithmetic, and the sampling with the seed that was drawn.

    The same request with these parameters gives the same answer, on the same model and arithmetic. The log has no
    content: the caller supplies the prompt. Exit code 5 where FOLDER is another model.
    """
    from qnext.errors import CorruptCheckpoint, UsageError
    from qnext.server.access.audit_reading import AuditFilter, read_lines
    from qnext.server.inference.origin import body_of
    from qnext.session.tracing import compare_origin

    if adapter is not None and model is None:
        raise UsageError("--adapter needs --model, the folder that it belongs to")
    wanted = AuditFilter(request_id=None if request_id == "last" else request_id)
    found = [line.values for line in read_lines(existing_log(log)) if line.values and wanted.takes(line.values)]
    traced = [values for values in found if values.get("trace")]
    if not traced:
        said = "has no answer that can be traced" if found else "is not in this log"
        raise UsageError(f"{log}: request {request_id[:64]!r} {said}")
    record = traced[-1]
    trace = record["trace"]
    differences = [] if model is None else compare_origin(trace, model, adapter)
    is_same = all(each.is_equal for each in differences if each.is_of_files)
    if as_json:
        compared = {each.name: {"recorded": each.recorded, "here": each.here} for each in differences}
        document = {"record": record, "body": body_of(trace), "compared": compared}
        print(json.dumps({**document, "is_same_model": is_same if model else None}, indent=2))
    else:
        _print(record, body_of(trace), differences)
    if len(traced) > 1 and wanted.request_id is not None:
        typer.echo(f"{len(traced)} answers have this id; this is the last of them", err=True)
    if not is_same:
        raise typer.Exit(CorruptCheckpoint.exit_code)


def _print(record: dict[str, Any], body: dict[str, Any], differences: list[Difference]) -> None:
    trace = record["trace"]
    rows = [[name, str(record[name])] for name in _SHOWN if record.get(name) is not None]
    rows += [[f"{name} name" if name == "model" else name, str(trace[name])] for name in _origin_names(trace)]
    for line in columns(rows):
        print(line)
    print(f"\nthe same request with these fields gives the same answer:\n{json.dumps(body)}")
    if trace["also_given"]:
        print(f"and with its own {', '.join(trace['also_given'])}, which the log does not hold")
    if len(trace["seeds"]) > 1:
        print(f"its prompts had seeds of their own, in this order: {trace['seeds']}; ask for one at a time")
    if differences:
        print()
    for each in differences:
        end = "the same" if each.is_equal else f"recorded {each.recorded}, here {each.here}"
        print(f"{each.name}: {end}")


def _origin_names(trace: dict[str, Any]) -> list[str]:
    names = ("model", "tokenizer", "template", "adapter", "version", "arithmetic", "settings")
    return [name for name in names if trace.get(name)]
