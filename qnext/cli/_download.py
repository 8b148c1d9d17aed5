"""Files of a hub model one by one, with what each has got so far. For bars on a terminal, or lines for a program."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FileReport = Callable[[str, int, int | None], None]  # file, bytes that are there, bytes in all

_NUM_WORKERS = 8
_LINE_SECONDS = 0.5  # between two lines of one file
_WAIT_SECONDS = 0.2  # between two looks for Ctrl-C


def download_files(name: str, out: Path | None, revision: str | None, allowed: list[str], report: FileReport) -> None:
    """Download what is missing of a model, several files side by side, each from where it stopped.

    `report` is called by one thread at a time, at once for every file with what is there. Where the hub cannot be asked
    nothing is done: whoever asks it next says why. Raises what huggingface_hub raises for a file.
    """
    import huggingface_hub

    try:
        files = huggingface_hub.snapshot_download(
            name, revision=revision, local_dir=out, allow_patterns=allowed, dry_run=True
        )
    except OSError:
        return
    has_stopped, lock = threading.Event(), threading.Lock()

    def serial(file: str, completed: int, total: int | None) -> None:
        if has_stopped.is_set():
            raise KeyboardInterrupt
        with lock:
            report(file, completed, total)

    def fetch(info: Any) -> None:
        huggingface_hub.hf_hub_download(
            name, info.filename, revision=info.commit_hash, local_dir=out, tqdm_class=_bar(info, serial)
        )
        serial(info.filename, info.file_size or 0, info.file_size)

    for info in files:
        serial(info.filename, 0 if info.will_download else info.file_size or 0, info.file_size)
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        futures = [pool.submit(fetch, info) for info in files if info.will_download]
        try:
            left = set(futures)
            while left:
                done, left = wait(left, timeout=_WAIT_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        except BaseException:
            has_stopped.set()  # the next piece of each file ends its thread
            for future in futures:
                future.cancel()
            raise


def _bar(info: Any, report: FileReport) -> type:
    """What huggingface_hub takes for a class of progress bars. One for each file: the hub passes no name on."""

    class Bar:
        """Counts the bytes of one file on disk; those on the way are another number, which is left out."""

        def __init__(self, *args: Any, initial: int = 0, **options: Any) -> None:
            self.completed = initial
            self.total = options.get("total") or info.file_size
            self.update(0)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, num_bytes: float | None = 1) -> None:
            self.completed += int(num_bytes or 0)
            report(info.filename, self.completed, self.total)

        def ignore(self, *args: Any, **options: Any) -> None:
            pass

        update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = ignore
        set_description_str = set_postfix = refresh = close = ignore

    return Bar


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
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        whole = bars.add_task("all files", total=None)

        def report(file: str, completed: int, total: int | None) -> None:
            sizes[file] = completed, total or completed
            is_done = completed == total
            if file not in tasks and completed and not is_done:
                tasks[file] = bars.add_task(file, total=total, completed=completed)
            if file in tasks:
                bars.update(tasks[file], completed=completed, total=total, visible=not is_done)
            done, everything = map(sum, zip(*sizes.values(), strict=True))
            bars.update(whole, completed=done, total=everything)

        yield report
