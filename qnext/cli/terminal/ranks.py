"""A run as one process, or as one of several that torchrun has started: the first one talks for all."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from qnext.errors import CorruptCheckpoint, LostRank, QnextError, QnextWarning, UsageError
from qnext.training import Diverged
from qnext.training.ranks import ALONE, TrainingRanks

# What all processes find alike.
_COMMON = (UsageError, CorruptCheckpoint, Diverged)


@contextmanager
def ranks_of_run(*, expert: int = 1, context: int = 1) -> Iterator[TrainingRanks]:
    """Who trains; see parallel.train.Division. Of an error that all processes have alike, the first one tells."""
    if not _is_one_of_several():
        for flag, size in (("expert", expert), ("context", context)):
            if size > 1:
                raise UsageError(f"--{flag}-parallel {size}: start as many processes: torchrun -m qnext train")
        yield ALONE
        return
    from qnext.parallel.train.ranks import Division, join_torchrun

    ranks = join_torchrun(Division(expert, context))
    if not ranks.is_first:
        warnings.simplefilter("ignore", QnextWarning)
    try:
        with ranks.guarded():
            yield ranks
        ranks.close()
    except QnextError as error:
        ranks.leave()
        if isinstance(error, LostRank):
            # The lowest that lives.
            is_heard = ranks.is_first or (ranks.rank == 1 and str(error).startswith("rank 0 "))
        else:
            is_heard = ranks.is_first or not isinstance(error, _COMMON)
        if is_heard:
            raise
        sys.exit(error.exit_code)


def refuse_ranks(what: str) -> None:
    """Raises UsageError where this process is one of several, which would all do the same."""
    if _is_one_of_several():
        raise UsageError(f"{what} runs in one process, and torchrun has started {os.environ['WORLD_SIZE']}")


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
