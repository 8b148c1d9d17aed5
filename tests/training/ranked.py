"""Processes that train one model together, for tests: each runs the jobs that it is sent."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from qnext.parallel.join import open_store
from qnext.parallel.train.ranks import Division, RanksOfRun

ALL_ALIKE = Division()
Job = Callable[..., Any]  # of the ranks and what is sent with it


class TrainingProcesses:
    """All of them, from the outside."""

    def __init__(
        self, processes: list[BaseProcess], connections: list[Connection], division: Division = ALL_ALIKE
    ) -> None:
        self.processes, self.connections, self.division = processes, connections, division

    def divided(self, division: Division) -> TrainingProcesses:
        """The same ones, divided otherwise."""
        return TrainingProcesses(self.processes, self.connections, division)

    def send(self, job: Job, *arguments: Any) -> None:
        """A job, to all of them."""
        for connection in self.connections:
            connection.send((job, self.division, arguments))

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """What a job, a function of a module, gives on each. Raises what the first one raises."""
        self.send(job, *arguments)
        found = [connection.recv() for connection in self.connections]
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found


@contextmanager
def processes(num_ranks: int) -> Iterator[TrainingProcesses]:
    """That end well."""
    with started(num_ranks) as found:
        yield found
        for connection in found.connections:
            connection.send(None)
        for process in found.processes:
            process.join(60)
            assert process.exitcode == 0


@contextmanager
def started(num_ranks: int, *, patience: float = 20.0) -> Iterator[TrainingProcesses]:
    """That are killed in the end."""
    context = multiprocessing.get_context("spawn")
    store = open_store("127.0.0.1", 0, is_first=True)
    made, connections = [], []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, rank, num_ranks, store.port, patience))
        process.start()
        theirs.close()
        made.append(process)
        connections.append(ours)
    try:
        yield TrainingProcesses(made, connections)
    finally:
        for process in made:
            process.kill()
            process.join()


def _rank(connection: Connection, rank: int, num_ranks: int, port: int, patience: float) -> None:
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
