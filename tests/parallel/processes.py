"""Ranks as processes that talk by gloo, for tests: each runs the jobs that it is sent."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from qnext.parallel.join import join, open_store
from qnext.parallel.mesh import Mesh
from qnext.parallel.watch import Vigilance

Job = Callable[..., Any]  # of the mesh, the link and what is sent with it


class Ranks:
    """All ranks, from the outside."""

    def __init__(self, processes: list[BaseProcess], connections: list[Connection]) -> None:
        self.processes, self.connections = processes, connections

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """What a job, a function of a module, gives on each rank. Raises what the first rank raises."""
        for connection in self.connections:
            connection.send((job, arguments))
        found = [connection.recv() for connection in self.connections]
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found


@contextmanager
def processes(tensor: int, expert: int = 1, *, patience: float = 20.0) -> Iterator[Ranks]:
    context = multiprocessing.get_context("spawn")
    store = open_store("127.0.0.1", 0, is_first=True)
    started, connections = [], []
    for rank in range(tensor * expert):
        ours, theirs = context.Pipe()
        process = context.Process(target=_rank, args=(theirs, Mesh(tensor, expert, rank), store.port, patience))
        process.start()
        theirs.close()
        started.append(process)
        connections.append(ours)
    try:
        yield Ranks(started, connections)
        for connection in connections:
            connection.send(None)
        for process in started:
            process.join(30)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()
            process.join()


def _rank(connection: Connection, mesh: Mesh, port: int, patience: float) -> None:
    torch.set_num_threads(1)
    link = join(mesh, open_store("127.0.0.1", port, is_first=False), Vigilance(patience))
    while (order := connection.recv()) is not None:
        job, arguments = order
        try:
            connection.send(job(mesh, link, *arguments))
        except Exception as error:
            connection.send(error)
    link.close()
