"""Processes of a test that work together: each runs what it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from qnext.parallel.join import open_store
from tests.forked import context

# A function of a module: of the orders, the rank, and the port of the store. It ends where the order is None.
Program = Callable[[Connection, int, int], None]


class Workers:
    """All processes, from the outside."""

    def __init__(self, processes: list[BaseProcess], connections: list[Connection]) -> None:
        self.processes, self.connections = processes, connections

    def send(self, order: Any) -> None:
        for connection in self.connections:
            connection.send(order)

    def ask(self, order: Any) -> list[Any]:
        """What each answers. Raises what the first one raises."""
        self.send(order)
        found = [connection.recv() for connection in self.connections]
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found


@contextmanager
def killed_in_the_end(num_ranks: int, program: Program) -> Iterator[Workers]:
    processes_of = context()
    store = open_store("127.0.0.1", 0, is_first=True)
    processes, connections = [], []
    for rank in range(num_ranks):
        ours, theirs = processes_of.Pipe()
        process = processes_of.Process(target=program, args=(theirs, rank, store.port))
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    try:
        yield Workers(processes, connections)
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def ending_well(num_ranks: int, program: Program) -> Iterator[Workers]:
    with killed_in_the_end(num_ranks, program) as workers:
        yield workers
        workers.send(None)
        for process in workers.processes:
            process.join(60)
            assert process.exitcode == 0
