"""How long torch's threads wait actively for work before they sleep. It is imported before torch.

torch divides operations among threads of libgomp. A thread without work looks for the next operation 300,000 times,
which takes some milliseconds, and holds a core meanwhile that another thread may need. Beside one busy process most of
the time is lost there (docs/log.md). libgomp reads its variables when torch is loaded.
"""

from __future__ import annotations

import os

SPIN_COUNT = "GOMP_SPINCOUNT"
WAIT_POLICY = "OMP_WAIT_POLICY"
SPINS = "1000"


def bound_spinning() -> None:
    """Set GOMP_SPINCOUNT for this process and its children, unless it or OMP_WAIT_POLICY is set.

    It has no effect on a torch that is loaded already.
    """
    if WAIT_POLICY not in os.environ:
        os.environ.setdefault(SPIN_COUNT, SPINS)


def environment_of_others() -> dict[str, str]:
    """The environment for a program that is measured beside qnext, without the variable that bound_spinning has set."""
    return {name: value for name, value in os.environ.items() if (name, value) != (SPIN_COUNT, SPINS)}
