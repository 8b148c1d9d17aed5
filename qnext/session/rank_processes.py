"""The other ranks of this machine as processes that the first one starts, and that never outlive it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from qnext.interrupts import held
from qnext.parallel.mesh import Mesh

_WORKER = "qnext.session.rank_worker"
_PACKAGES = Path(__file__).parents[2]


class RankStart(NamedTuple):
    """What a process has to know to become a rank; all else comes from the first one."""

    tensor: int
    expert: int
    rank: int
    port: int  # of the store, on the loopback interface
    threads: int
    patience: float

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.tensor, self.expert, self.rank)

    def to_argument(self) -> str:
        return json.dumps(self)

    @classmethod
    def from_argument(cls, text: str) -> RankStart:
        return cls(*json.loads(text))


class RankProcesses:
    """All ranks of `mesh` but the first. Each ends when this process does: its standard input ends then."""

    def __init__(self, mesh: Mesh, *, port: int, threads: int, patience: float) -> None:
        self._started: dict[int, subprocess.Popen[bytes]] = {}
        path = os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        with held():
            for rank in range(1, mesh.num_ranks):
                start = RankStart(mesh.tensor, mesh.expert, rank, port, threads, patience)
                self._started[rank] = subprocess.Popen(
                    [sys.executable, "-m", _WORKER, start.to_argument()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C in the terminal is for the first rank
                )

    @property
    def exits(self) -> Mapping[int, Callable[[], int | None]]:
        """How each has ended, None: not yet."""
        return {rank: process.poll for rank, process in self._started.items()}

    def kill(self) -> None:
        for process in self._started.values():
            process.kill()

    def end(self, seconds: float) -> None:
        """Wait until all have ended; after so many seconds they are killed."""
        deadline = time.monotonic() + seconds
        for process in self._started.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
