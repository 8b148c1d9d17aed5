"""How long torch's threads watch for work before they sleep. Imported before torch.

torch divides operations among threads of libgomp. One that is done watches for the next operation 300,000 times, some
milliseconds, and holds a core meanwhile that another thread may need: beside one busy process most of the time goes
there (docs/log.md). libgomp reads its variables when torch is loaded.
"""

from __future__ import annotations

import os

SPIN_COUNT = "GOMP_SPINCOUNT"
WAIT_POLICY = "OMP_WAIT_POLICY"
SPINS = "1000"


def bound_spinning() -> None:
    """Set GOMP_SPINCOUNT for this process and those that it starts, unless it or OMP_WAIT_POLICY is set.

    Without effect on a torch that is loaded already.
    """
    if WAIT_POLICY not in os.environ:
        os.environ.setdefault(SPIN_COUNT, SPINS)


def environment_of_others() -> dict[str, str]:
    """The environment of a program that is measured beside us: what bound_spinning has set is left out."""
    return {name: value for name, value in os.environ.items() if (name, value) != (SPIN_COUNT, SPINS)}
