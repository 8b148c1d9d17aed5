"""`qnext pull`: a model from the Hugging Face hub."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.terminal.progress import bars

if TYPE_CHECKING:
    from rich.progress import TaskID

    from qnext.checkpoint.hub import FileReport

_LINE_SECONDS = 0.5  # between two lines of one file


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="organisation/model")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="a folder; default: the local cache")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="progress and folder on stdout, a line of JSON each, as it happens")
    ] = False,
) -> None:
    """Download a model and print its folder. An interrupted download continues where it stopped.

    With --json: lines {"file", "completed", "total"} in bytes, then {"folder"}.
    """
    from qnext.checkpoint.hub import pull_model
    from qnext.errors import UsageError

    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{out}: exists and is no folder")
    with file_lines() if as_json else file_bars() as report:
        folder = pull_model(name, out, revision, report=report)
    print(json.dumps({"folder": str(folder)}) if as_json else folder)


@contextmanager
def file_lines() -> Iterator[FileReport]:
    """Reports as lines of JSON on stdout: {"file", "completed", "total"}, for each file twice a second at most, and
    always the first and the last."""
    printed: dict[str, float] = {}

    def report(file: str, completed: int, total: int | None) -> None:
        now = time.monotonic()
        if now - printed.get(file, float("-inf")) < _LINE_SECONDS and completed != total:
            return
        if printed.get(file) == float("inf"):
            return
        printed[file] = float("inf") if completed == total else now
        print(json.dumps({"file": file, "completed": completed, "total": total}), flush=True)

    yield report


@contextmanager
def file_bars() -> Iterator[FileReport | None]:
    """Reports as a bar for each file that is under way and one for all, on stderr; None where that is no terminal."""
    tasks: dict[str, TaskID] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with bars("DownloadColumn", "TransferSpeedColumn") as shown:
        if shown is None:
            yield None
            return
        whole = shown.add_task("all files", total=None)

        def report(file: str, completed: int, total: int | None) -> None:
            sizes[file] = completed, total or completed
            is_done = completed == total
            if file not in tasks and completed and not is_done:
                tasks[file] = shown.add_task(file, total=total, completed=completed)
            if file in tasks:
                shown.update(tasks[file], completed=completed, total=total, visible=not is_done)
            done, everything = map(sum, zip(*sizes.values(), strict=True))
            shown.update(whole, completed=done, total=everything)

        yield report
