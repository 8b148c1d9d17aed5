"""Whether all ranks live. Each rank counts up a number in the store that all share, and looks at the others'."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch.distributed as dist

from qnext.errors import LostRank, QnextError
from qnext.parallel.mesh import PATIENCE

_BEAT_SECONDS = 0.5
_LOOK_SECONDS = 0.02
_GRACE_SECONDS = 3.0  # for whoever runs to end by itself, with its own last words
_SUSPICION_SECONDS = 3.0  # instead of the patience, once a call to other ranks has failed
_FAILURE = "failure"


class Vigilance(NamedTuple):
    """What a watch takes for a loss, and what follows. `exits` tells of ranks that this one has started how they ended,
    None: not yet. `on_lost` is called once. With `ends_process` a process ends that has not ended by itself, because it
    waits for the lost rank."""

    patience: float = PATIENCE
    exits: Mapping[int, Callable[[], int | None]] = {}
    on_lost: Callable[[], None] = lambda: None
    ends_process: bool = True


class RankWatch:
    """Looks at all ranks until `close`. Where one is gone, says that it has failed, or shows no life for too long,
    `verdict` says so. A process that nobody tells ends a little later with the exit code of LostRank."""

    def __init__(self, store: dist.Store, rank: int, num_ranks: int, vigilance: Vigilance) -> None:
        self._store, self._rank, self._num_ranks, self._vigilance = store, rank, num_ranks, vigilance
        self._lost: LostRank | None = None
        self._is_known, self._is_closed, self._is_told = threading.Event(), threading.Event(), threading.Event()
        self._is_suspected = False
        with contextlib.suppress(RuntimeError):  # found by the thread
            self._beat()  # from the first moment on its silence counts
        self._thread = threading.Thread(target=self._run, name="watch of ranks", daemon=True)
        self._thread.start()

    def verdict(self) -> LostRank | None:
        """Which rank is lost, after a call to others has failed. Waits until that is known; None where all live."""
        self._is_suspected = True
        self._is_known.wait(self._patience + 2 * _BEAT_SECONDS)
        self._is_told.set()
        return self._lost

    def meet(self, place: str, *, seconds: float = math.inf) -> bool:
        """Wait until all ranks have come to a place, which has its name for this once. False: not in time. Raises
        LostRank."""
        end, num_there = time.monotonic() + seconds, 0
        try:
            num_there = self._store.add(f"at/{place}", 1)
            while num_there < self._num_ranks and not self._is_known.is_set() and time.monotonic() < end:
                time.sleep(_LOOK_SECONDS)
                num_there = self._store.add(f"at/{place}", 0)
        except RuntimeError:  # the store is gone, and who had it
            self._is_suspected = True
            self._is_known.wait(_SUSPICION_SECONDS)
        if self._is_known.is_set():
            self._is_told.set()
            assert self._lost is not None
            raise self._lost
        return num_there == self._num_ranks

    def tell(self, error: BaseException) -> None:
        """Why this rank ends; the first word of all ranks counts."""
        if isinstance(error, LostRank):
            return
        words = str(error) if isinstance(error, QnextError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, QnextError) else LostRank.exit_code
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_FAILURE, "", json.dumps([self._rank, code, words]))

    def told(self) -> LostRank | None:
        """What another rank has told; its exit code is that of its error."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILURE]):
                rank, code, words = json.loads(self._store.get(_FAILURE))
                if rank != self._rank:
                    return LostRank.because(f"rank {rank}: {words}", code)
        return None

    def close(self) -> None:
        self._is_closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _beat(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)

    @property
    def _patience(self) -> float:
        longest = self._vigilance.patience
        return min(longest, _SUSPICION_SECONDS) if self._is_suspected else longest

    def _run(self) -> None:
        seen = dict.fromkeys(range(self._num_ranks), (0, time.monotonic()))
        while not self._is_closed.wait(_BEAT_SECONDS):
            self._lost = self._find(seen)
            if self._lost is not None:
                self._is_known.set()
                self._vigilance.on_lost()
                self._is_closed.wait(_GRACE_SECONDS)
                if self._vigilance.ends_process and not self._is_closed.is_set() and not self._is_told.is_set():
                    _end(self._lost)
                return

    def _find(self, seen: dict[int, tuple[int, float]]) -> LostRank | None:
        """Which rank is lost; None while all live. One that has not begun to beat is waited for."""
        told = self.told()
        if told is not None:
            return told
        for rank, exit_code in self._vigilance.exits.items():
            if (code := exit_code()) is not None:
                how = f"signal {-code} ended it" if code < 0 else f"it ended with {code}"
                return self.told() or LostRank(f"rank {rank} was lost: {how}")
        try:
            self._beat()
            now = time.monotonic()
            for rank in range(self._num_ranks):
                beats = self._store.add(f"beat/{rank}", 0)
                if beats != seen[rank][0]:
                    seen[rank] = beats, now
                elif rank != self._rank and beats and now - seen[rank][1] > self._patience:
                    return LostRank(f"rank {rank} was lost: it has shown no life for {self._patience:g} seconds")
        except RuntimeError:  # the store is in the first rank's process
            return LostRank("rank 0 was lost: its store does not answer")
        return None


def _end(lost: LostRank) -> None:
    """The process waits for a rank that will not answer, and nothing else ends that."""
    print(f"qnext: {lost}", file=sys.stderr, flush=True)
    os._exit(lost.exit_code)
