"""Snapshots that are written while training goes on: what one holds is copied, and a thread writes the copies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qnext.checkpoint.reading import as_bytes
from qnext.checkpoint.snapshot import Snapshot, list_snapshots, path_of
from qnext.errors import FULL, DiskFull, QnextError, UsageError, line_of
from qnext.planning import machine
from qnext.training.ranks import TrainingRanks
from qnext.training.saving import save_of_ranks

_SHARE_FOR_COPIES = 0.5  # of the memory that is free: training goes on beside them
_REPLACED_WHOLE = "best"  # its tensors are never changed in place


class SnapshotFailed(QnextError):
    """A snapshot could not be written; the earlier ones still exist. A full disk keeps its own exit code."""

    def __init__(self, error: OSError, newest: Path | None) -> None:
        kept = "there is no earlier one" if newest is None else f"the newest is {newest.name}"
        super().__init__(f"{line_of(error)}; {kept}")
        self.exit_code = DiskFull.exit_code if error.errno in FULL else UsageError.exit_code


class SnapshotWriter:
    """Writes the snapshots of a run, one at a time: at once, or on a thread while training goes on.

    The memory for copies is taken when the first snapshot begins, and kept. Where it would be more than half of what
    is free, a snapshot is written at once. Ranks talk about snapshots apart from training.
    """

    def __init__(self, folder: Path, *, keep: int, part_of: Mapping[str, Tensor], ranks: TrainingRanks) -> None:
        self._folder, self._keep, self._part_of, self._ranks = folder, keep, part_of, ranks
        self._copies: dict[str, Tensor] = {}
        self._begun: tuple[int, Future[Path]] | None = None

    @property
    def begun_step(self) -> int | None:
        """Of the snapshot whose end nobody has asked for."""
        return None if self._begun is None else self._begun[0]

    @property
    def is_written(self) -> bool:
        """Whether `ended` would not wait."""
        return self._begun is not None and self._begun[1].done()

    def begin(self, snapshot: Snapshot) -> None:
        """Copy what a snapshot holds, and write the copies on a thread. Nothing else may be begun."""
        assert self._begun is None, "one at a time"
        copied = self._copied(snapshot)
        if copied is None:
            self._begun = snapshot.step, _done(lambda: self.write(snapshot))
        else:
            self._begun = snapshot.step, _done_on_a_thread(lambda: self.write(copied))

    def ended(self) -> Path:
        """Wait for the snapshot that was begun. Raises SnapshotFailed where it could not be written."""
        assert self._begun is not None
        (_, written), self._begun = self._begun, None
        return written.result()

    def write(self, snapshot: Snapshot) -> Path:
        """Write a snapshot: it is on the disk when this returns. Raises SnapshotFailed."""
        try:
            save_of_ranks(self._folder, snapshot, keep=self._keep, part_of=self._part_of, ranks=self._ranks.aside)
        except OSError as error:
            raise SnapshotFailed(error, next(reversed(list_snapshots(self._folder)), None)) from error
        return path_of(self._folder, snapshot.step)

    def _copied(self, snapshot: Snapshot) -> Snapshot | None:
        """In memory of the host that nobody else changes; None where there is too little."""
        sources = {
            f"{kind}/{name}": each
            for kind, tensors in snapshot.tensors.items()
            if kind != _REPLACED_WHOLE
            for name, each in tensors.items()
        }
        missing = {
            name: each
            for name, each in sources.items()
            if name not in self._copies or self._copies[name].shape != each.shape
        }
        needed = sum(each.nbytes for each in missing.values()) * self._ranks.num_here
        if needed > _SHARE_FOR_COPIES * machine.available_bytes():
            return None
        for name, each in missing.items():
            self._copies[name] = torch.empty(each.shape, dtype=each.dtype, pin_memory=each.is_cuda)
        for name, each in sources.items():
            _copy(each.detach(), self._copies[name])
        if any(each.is_cuda for each in sources.values()):
            torch.cuda.synchronize()
        tensors = {
            kind: {name: self._copies.get(f"{kind}/{name}", each) for name, each in collection.items()}
            for kind, collection in snapshot.tensors.items()
        }
        return replace(snapshot, tensors=tensors)


def _copy(source: Tensor, target: Tensor) -> None:
    """By one thread: in hundreds of short copies threads wait for each other longer than they copy."""
    if source.device.type == "cpu":
        np.copyto(as_bytes(target).numpy(), as_bytes(source.contiguous()).numpy())
    else:
        target.copy_(source, non_blocking=source.is_cuda)


def _done(action: Callable[[], Path]) -> Future[Path]:
    future: Future[Path] = Future()
    try:
        future.set_result(action())
    except SnapshotFailed as error:
        future.set_exception(error)
    return future


def _done_on_a_thread(action: Callable[[], Path]) -> Future[Path]:
    """The thread ends with the process, whatever it is at: a snapshot without a name is none."""
    future: Future[Path] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=act, name="snapshot", daemon=True).start()
    return future
