"""How a model is spread over several ranks, as users say it, and which rank a launcher has made of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qnext.errors import UsageError
from qnext.parallel.mesh import PATIENCE, Mesh, check_mesh

if TYPE_CHECKING:
    from qnext.config import ModelConfig

EVEN, AUTO = "even", "auto"


class Launched(NamedTuple):
    """What `torchrun` says to a process. `has_store`: the launcher has made the store at that address."""

    rank: int
    num_ranks: int
    num_local: int
    host: str
    port: int
    has_store: bool = False
    attempt: int = 0
    local_rank: int = 0  # among the processes of this machine

    @classmethod
    def found_in(cls, environment: Mapping[str, str]) -> Launched | None:
        """None where no launcher has started this process. Raises UsageError for numbers that are none."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(name in environment for name in names):
            return None
        try:
            rank, num_ranks, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            num_local = int(environment.get("LOCAL_WORLD_SIZE", num_ranks))
            local_rank = int(environment.get("LOCAL_RANK", rank % max(1, num_local)))
            attempt = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
        except ValueError:
            raise UsageError("RANK, WORLD_SIZE and MASTER_PORT of the environment must be whole numbers") from None
        has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, num_ranks, num_local, environment["MASTER_ADDR"], port, has_store, attempt, local_rank)


@dataclass(frozen=True)
class RankOptions:
    """`tensor_parallel` times `expert_parallel` ranks, each with `threads` threads; None shares out the cores.

    `placement` of experts: even, auto (by the loads of earlier runs), or a file of `qnext experts --save-baseline`; so
    many of the hottest of each layer have `copies` on further ranks. `patience` in seconds is how long a rank may show
    no life. Without `launched` the ranks are processes that this one starts.
    """

    tensor_parallel: int = 1
    expert_parallel: int = 1
    patience: float = PATIENCE
    placement: str = EVEN
    copies: int = 0
    threads: int | None = None
    launched: Launched | None = None

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.expert_parallel

    @property
    def num_local(self) -> int:
        """Ranks on this machine."""
        return self.num_ranks if self.launched is None else self.launched.num_local

    def local_rank(self, rank: int) -> int:
        """The number of rank `rank`, which is this process's, among those of this machine."""
        return rank if self.launched is None else self.launched.local_rank

    def mesh(self, rank: int) -> Mesh:
        return Mesh(self.tensor_parallel, self.expert_parallel, rank)

    def check(self) -> None:
        """What contradicts itself, or the launcher. Raises UsageError."""
        if self.tensor_parallel < 1 or self.expert_parallel < 1:
            raise UsageError("--tensor-parallel and --expert-parallel are at least 1")
        if self.launched is not None and self.launched.num_ranks != self.num_ranks:
            raise UsageError(
                f"--tensor-parallel {self.tensor_parallel} --expert-parallel {self.expert_parallel} make "
                f"{self.num_ranks} ranks, but torchrun has started {self.launched.num_ranks} processes"
            )
        if self.num_ranks == 1 and (self.placement, self.copies, self.patience) != (EVEN, 0, PATIENCE):
            raise UsageError(
                "--expert-placement, --expert-copies and --rank-patience need several ranks: --tensor-parallel or "
                "--expert-parallel"
            )
        if self.copies and self.placement == EVEN:
            raise UsageError("--expert-copies: which experts are hot? --expert-placement says it")

    def check_model(self, config: ModelConfig) -> None:
        """Raises UsageError for a model that cannot be divided so."""
        check_mesh(config, self.mesh(0))
        if self.placement != EVEN and not config.num_experts:
            raise UsageError(f"--expert-placement {self.placement}: the model has no experts")


ONE_PROCESS = RankOptions()


def share_of_threads(options: RankOptions) -> int:
    """Threads of each rank. A launcher gives processes one thread each where the user says nothing."""
    import torch

    from qnext.planning import machine

    if options.threads is not None:
        return options.threads
    if options.launched is None:
        return max(1, torch.get_num_threads() // options.num_local)
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return torch.get_num_threads()
    return max(1, int(machine.processor().num_usable) // options.num_local)
