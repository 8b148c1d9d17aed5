"""Whether all ranks live. Each rank counts up a number in the store that all share, and looks at the others'."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

from qnext.errors import LostRank

_BEAT_SECONDS = 0.5
_GRACE_SECONDS = 3.0  # for whoever runs to end by itself, with its own last words


class RankWatch:
    """Looks at all ranks until `close`. Where one is gone, or shows no life for `patience` seconds, `verdict` says so;
    a process that has not ended by then, because it waits for that rank, ends a little later with the exit code of
    LostRank. `exits` tells of ranks that this one has started how they ended, None: not yet."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        num_ranks: int,
        *,
        patience: float,
        exits: Mapping[int, Callable[[], int | None]] | None = None,
    ) -> None:
        self._store, self._rank, self._num_ranks, self._patience = store, rank, num_ranks, patience
        self._exits = exits or {}
        self._lost: LostRank | None = None
        self._is_known, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch of ranks", daemon=True)
        self._thread.start()

    def verdict(self) -> LostRank | None:
        """Which rank is lost. Waits until that is known; None where all live."""
        self._is_known.wait(self._patience + 2 * _BEAT_SECONDS)
        return self._lost

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _run(self) -> None:
        seen = dict.fromkeys(range(self._num_ranks), (0, time.monotonic()))
        while not self._is_closed.wait(_BEAT_SECONDS):
            reason = self._reason(seen)
            if reason is not None:
                self._lost = LostRank(reason)
                self._is_known.set()
                if not self._is_closed.wait(_GRACE_SECONDS):
                    _end(self._lost)
                return

    def _reason(self, seen: dict[int, tuple[int, float]]) -> str | None:
        """Which rank is lost, and why; None while all live. One that has not begun to beat is waited for."""
        for rank, exit_code in self._exits.items():
            if (code := exit_code()) is not None:
                return f"rank {rank} was lost: " + (f"signal {-code} ended it" if code < 0 else f"it ended with {code}")
        try:
            self._store.add(f"beat/{self._rank}", 1)
            now = time.monotonic()
            for rank in range(self._num_ranks):
                beats = self._store.add(f"beat/{rank}", 0)
                if beats != seen[rank][0]:
                    seen[rank] = beats, now
                elif rank != self._rank and beats and now - seen[rank][1] > self._patience:
                    return f"rank {rank} was lost: it has shown no life for {self._patience:g} seconds"
        except RuntimeError:  # the store is in the first rank's process
            return "rank 0 was lost: its store does not answer"
        return None


def _end(lost: LostRank) -> None:
    """The process waits for a rank that will not answer, and nothing else ends that."""
    print(f"qnext: {lost}", file=sys.stderr, flush=True)
    os._exit(lost.exit_code)
