"""The residents of the last run, beside the model: the next one begins with them instead of with empty memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qnext import files
from qnext.ops import Residency

RECALL_SECONDS = 5.0  # of a start
FILE_NAME = ".qnext-residents.json"
_VERSION = 1
_ROUNDS = 8  # all layers are filled a part at a time: time may be over before the last one
_MAX_BYTES = 64 << 20


def remember(residency: Residency, folder: Path) -> bool:
    """Write who is resident, and how much these and others are wanted. Says whether that worked: not in a read-only
    folder."""
    residents = [residency.residents(number) for number in range(len(residency.layers))]
    if not any(residents):
        return False
    layers = [[*known, *residency.others(number)] for number, known in enumerate(residents)]
    try:
        files.write_file(folder / FILE_NAME, json.dumps({"version": _VERSION, "layers": layers}, separators=(",", ":")))
    except OSError:
        return False
    return True


@contextmanager
def recalling(residency: Residency, folder: Path, *, seconds: float = RECALL_SECONDS) -> Iterator[None]:
    """Recall on a thread of its own while other weights are read: that waits for memory and the processor, this for the
    disk. The block ends when recall has ended, at once where it fails."""
    is_over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="recall") as pool:
        reading = pool.submit(recall, residency, folder, seconds=seconds, is_over=is_over)
        try:
            yield
        except BaseException:
            is_over.set()
            raise
        reading.result()


def recall(residency: Residency, folder: Path, *, seconds: float, is_over: threading.Event | None = None) -> int:
    """Read the experts that were resident, the most wanted first, for so many seconds at most, or until `is_over`. How
    many were read; none where nothing is remembered, or nothing that fits this model."""
    layers = _read(folder / FILE_NAME, num_layers=len(residency.layers), num_experts=residency.num_experts)
    deadline, count = time.monotonic() + seconds, 0
    for turn in range(_ROUNDS):
        for number, known in enumerate(layers):
            if time.monotonic() >= deadline or (is_over is not None and is_over.is_set()):
                return count
            part = slice(turn * len(known) // _ROUNDS, (turn + 1) * len(known) // _ROUNDS)
            count += residency.fill(number, known[part])
    return count


def _read(path: Path, *, num_layers: int, num_experts: int) -> list[list[tuple[int, int]]]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return []
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != _VERSION or len(document["layers"]) != num_layers:
            return []
        layers = [[(int(expert), int(load)) for expert, load in known] for known in document["layers"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    is_sound = all(0 <= e < num_experts and 0 <= load < 1 << 62 for known in layers for e, load in known)
    return layers if is_sound else []
