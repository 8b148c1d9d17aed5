"""A process becomes one of several ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from qnext.errors import LostRank
from qnext.parallel.link import DistributedLink
from qnext.parallel.mesh import Mesh
from qnext.parallel.watch import RankWatch, Vigilance

LOOPBACK = "127.0.0.1"
_TIMEOUT = timedelta(seconds=600)  # to find the store
_INTERFACE = "GLOO_SOCKET_IFNAME"


def open_store(host: str, port: int, *, is_first: bool) -> dist.TCPStore:
    """Where ranks find each other. The first rank makes it; port 0 takes a free one. Raises LostRank where there is
    none."""
    try:
        return dist.TCPStore(host, port, is_master=is_first, wait_for_workers=False, timeout=_TIMEOUT)
    except RuntimeError as error:
        raise LostRank(f"rank 0 was not found at {host}:{port}") from error


def open_loopback_store() -> dist.TCPStore:
    """The first rank's, which no other machine reaches."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


def join(
    mesh: Mesh, store: dist.Store, vigilance: Vigilance | None = None, *, num_local: int = 1, on_loopback: bool = False
) -> DistributedLink:
    """Waits for the other ranks, of which `num_local` are on this machine, this one included. With `on_loopback` all
    are, and none listens to another machine. Raises LostRank where one is gone."""
    watch = RankWatch(store, mesh.rank, mesh.num_ranks, vigilance or Vigilance())
    try:
        watch.meet("start")
        with _interface("lo" if on_loopback else None):
            return DistributedLink(mesh, store, watch, num_local=num_local)
    except BaseException:
        watch.close()
        raise


@contextmanager
def _interface(name: str | None) -> Iterator[None]:
    """Have gloo listen on this interface, where there is such a one and the environment names none."""
    if name is None or _INTERFACE in os.environ or not Path("/sys/class/net", name).exists():
        yield
        return
    os.environ[_INTERFACE] = name
    try:
        yield
    finally:
        del os.environ[_INTERFACE]
