"""Ranks as processes that talk by gloo, for tests: each runs the jobs that it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from qnext.parallel.join import join, open_store
from qnext.parallel.mesh import Mesh
from qnext.parallel.watch import Vigilance
from tests.parallel.workers import Workers, ending_well

Job = Callable[..., Any]  # of the mesh, the link and what is sent with it


class Ranks:
    """All ranks, from the outside."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """What a job, a function of a module, gives on each rank. Raises what the first rank raises."""
        return self._workers.ask((job, arguments))


@contextmanager
def processes(tensor: int, expert: int = 1, *, patience: float = 20.0) -> Iterator[Ranks]:
    with ending_well(tensor * expert, partial(_rank, Mesh(tensor, expert), patience)) as workers:
        yield Ranks(workers)


def _rank(whole: Mesh, patience: float, connection: Connection, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    mesh = whole._replace(rank=rank)
    link = join(mesh, open_store("127.0.0.1", port, is_first=False), Vigilance(patience))
    for job, arguments in iter(connection.recv, None):
        try:
            connection.send(job(mesh, link, *arguments))
        except Exception as error:
            connection.send(error)
    link.close()
