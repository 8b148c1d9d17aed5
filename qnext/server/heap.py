"""Keeps the memory of a long-running process constant: few arenas, and free pages go back to the system.

The kernels keep freed memory (`ops.keep_freed_memory`), so the heap never shrinks by itself. Holes in it become
resident one by one, and the memory would grow as long as a server runs. Trimming every minute prevents this. It works
with glibc; elsewhere these functions do nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import platform
from collections.abc import Callable

_M_ARENA_MAX = -8
_MAX_ARENAS = 2


def bound_arenas() -> bool:
    """Limit all threads of the process to two arenas. glibc would make up to eight per core. Returns whether that
    worked.

    A thread takes an arena at its first allocation, so call this before threads are started.
    """
    return _is_glibc() and ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _MAX_ARENAS) == 1


def trim() -> bool:
    """Give whole free pages of the heap back to the system. Returns whether there were any. Other threads continue
    meanwhile."""
    return _is_glibc() and ctypes.CDLL(None).malloc_trim(0) == 1


async def keep_trimmed(
    is_busy: Callable[[], bool], *, look_seconds: float = 1.0, idle_seconds: float = 5.0, busy_seconds: float = 60.0
) -> None:
    """Trim once after `idle_seconds` without a request, and every `busy_seconds` where there is no such pause.

    Calls `is_busy` every `look_seconds`, until it is cancelled.
    """
    if not _is_glibc():
        return
    clock = asyncio.get_running_loop().time
    trimmed = asked = clock()
    is_clean = False  # nobody has asked since
    while True:
        await asyncio.sleep(look_seconds)
        now = clock()
        if is_busy():
            asked, is_clean = now, False
        if not is_clean and (now - asked >= idle_seconds or now - trimmed >= busy_seconds):
            await asyncio.to_thread(trim)
            trimmed, is_clean = clock(), True


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
