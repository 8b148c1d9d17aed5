"""Processes that train one model together, for tests: each runs the jobs that it is sent."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from qnext.parallel.join import open_store
from qnext.parallel.train.ranks import Division, RanksOfRun

ALL_ALIKE = Division()
Job = Callable[..., Any]  # of the ranks and what is sent with it


class TrainingProcesses:
    """All of them, from the outside."""

    def __init__(self, processes: list[BaseProcess], connections: list[Connection]) -> None:
        self.processes, self.connections = processes, connections

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """What a job, a function of a module, gives on each. Raises what the first one raises."""
        for connection in self.connections:
            connection.send((job, arguments))
        found = [connection.recv() for connection in self.connections]
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found


@contextmanager
def processes(num_ranks: int, division: Division = ALL_ALIKE) -> Iterator[TrainingProcesses]:
    """That end well."""
    with started(num_ranks, division) as found:
        yield found
        for connection in found.connections:
            connection.send(None)
        for process in found.processes:
            process.join(60)
            assert process.exitcode == 0


@contextmanager
def started(num_ranks: int, division: Division = ALL_ALIKE, *, patience: float = 20.0) -> Iterator[TrainingProcesses]:
    """That are killed in the end."""
    context = multiprocessing.get_context("spawn")
    store = open_store("127.0.0.1", 0, is_first=True)
    made, connections = [], []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, rank, num_ranks, store.port, division, patience))
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


def _rank(connection: Connection, rank: int, num_ranks: int, port: int, division: Division, patience: float) -> None:
    torch.set_num_threads(1)
    store = open_store("127.0.0.1", port, is_first=False)
    ranks = RanksOfRun(store, rank, num_ranks, division, patience=patience)
    while (order := connection.recv()) is not None:
        job, arguments = order
        try:
            connection.send(job(ranks, *arguments))
        except BaseException as error:
            connection.send(error)
    ranks.close()
