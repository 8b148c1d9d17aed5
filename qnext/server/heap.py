"""The heap of a process that lives for months: few arenas, and what lies free in them given back to the system.

The kernels want freed memory kept (`ops.keep_freed_memory`), so the heap alone never shrinks: each hole becomes
resident when something is put there for the first time, and memory creeps for as long as a server runs. Going through
the heap every minute makes that a flat line. For glibc; elsewhere nothing is done.
"""

from __future__ import annotations

import asyncio
import ctypes
import platform
import time
from collections.abc import Callable

_M_ARENA_MAX = -8
_MAX_ARENAS = 2


def bound_arenas() -> bool:
    """Keep all threads to two arenas, where glibc would make eight for each core; says whether that worked.

    A thread takes one when it first allocates, so this comes before threads are started. For whole processes.
    """
    return _is_glibc() and ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MAX_ARENAS) == 1


def trim() -> bool:
    """Give whole free pages of the heap back to the system; says whether there were any. Other threads run on."""
    return _is_glibc() and ctypes.CDLL(None).malloc_trim(0) == 1


async def keep_trimmed(
    is_busy: Callable[[], bool], *, look_seconds: float = 1.0, idle_seconds: float = 5.0, busy_seconds: float = 60.0
) -> None:
    """Trim when nobody has asked for `idle_seconds`, once, and every `busy_seconds` while there is no such pause.

    Looks at `is_busy` every `look_seconds`, until it is cancelled.
    """
    if not _is_glibc():
        return
    trimmed = asked = time.monotonic()
    is_clean = False  # nobody has asked since
    while True:
        await asyncio.sleep(look_seconds)
        now = time.monotonic()
        if is_busy():
            asked, is_clean = now, False
        if not is_clean and (now - asked >= idle_seconds or now - trimmed >= busy_seconds):
            await asyncio.to_thread(trim)
            trimmed, is_clean = time.monotonic(), True


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
