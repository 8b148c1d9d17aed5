"""A process becomes one of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist

from qnext.errors import LostRank
from qnext.parallel.link import DistributedLink
from qnext.parallel.mesh import Mesh
from qnext.parallel.watch import RankWatch

PATIENCE = 60.0  # seconds without a sign of life of a rank, whose process beats twice a second whatever it computes
_SECONDS_TO_MEET = 600.0


def open_store(host: str, port: int, *, is_first: bool) -> dist.TCPStore:
    """Where ranks find each other. The first rank makes it; port 0 takes a free one. Raises LostRank where there is
    none."""
    try:
        return dist.TCPStore(
            host, port, is_master=is_first, wait_for_workers=False, timeout=timedelta(seconds=_SECONDS_TO_MEET)
        )
    except RuntimeError as error:
        raise LostRank(f"rank 0 was not found at {host}:{port}") from error


def join(
    mesh: Mesh,
    store: dist.Store,
    *,
    patience: float = PATIENCE,
    exits: Mapping[int, Callable[[], int | None]] | None = None,
) -> DistributedLink:
    """Waits for the other ranks. `exits` are those of RankWatch. Raises LostRank where one is gone."""
    watch = RankWatch(store, mesh.rank, mesh.num_ranks, patience=patience, exits=exits)
    return DistributedLink(mesh, store, watch)
