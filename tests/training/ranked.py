"""Processes that train one model together, for tests: each runs the jobs that it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from qnext.parallel.join import open_store
from qnext.parallel.train.ranks import Division, RanksOfRun
from tests.parallel.workers import Workers, ending_well, killed_in_the_end

ALL_ALIKE = Division()
Job = Callable[..., Any]  # of the ranks and what is sent with it


class TrainingProcesses:
    """All of them, from the outside."""

    def __init__(self, workers: Workers, division: Division = ALL_ALIKE) -> None:
        self.workers, self._division = workers, division

    def divided(self, division: Division) -> TrainingProcesses:
        """The same ones, divided otherwise."""
        return TrainingProcesses(self.workers, division)

    def send(self, job: Job, *arguments: Any) -> None:
        """A job, to all of them."""
        self.workers.send((job, self._division, arguments))

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """What a job, a function of a module, gives on each. Raises what the first one raises."""
        return self.workers.ask((job, self._division, arguments))


@contextmanager
def processes(num_ranks: int) -> Iterator[TrainingProcesses]:
    """That end well."""
    with ending_well(num_ranks, partial(_rank, num_ranks, 20.0)) as workers:
        yield TrainingProcesses(workers)


@contextmanager
def started(num_ranks: int, *, patience: float) -> Iterator[TrainingProcesses]:
    """That are killed in the end."""
    with killed_in_the_end(num_ranks, partial(_rank, num_ranks, patience)) as workers:
        yield TrainingProcesses(workers)


def _rank(num_ranks: int, patience: float, connection: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    store = open_store("127.0.0.1", port, is_first=False)
    for number, (job, division, arguments) in enumerate(iter(connection.recv, None)):
        place = dist.PrefixStore(str(number), store)
        ranks = RanksOfRun(place, rank, num_ranks, division, patience=patience)
        try:
            connection.send(job(ranks, *arguments))
        except BaseException as error:
            connection.send(error)
        ranks.close()
