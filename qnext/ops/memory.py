"""Memory for weights and caches, in huge pages where the system has them. Memory for temporaries, kept when it is
freed.

Weights are read once per token from the first byte to the last. In ordinary pages of 4 KiB, address translation costs a
third of the memory bandwidth, and touching the pages for the first time takes five times as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import platform
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_SLAB_BYTES = 256 << 20
_ALIGNMENT = 256
_SMALLEST = 64 << 10  # what is smaller comes from torch's allocator
_TOUCHED_AT_ONCE = 16 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python has no name for it


class _Slabs:
    """Hands out consecutive parts of large mappings, so that few huge pages stay partly used.

    A mapping is given back to the system when the last tensor in it is gone. Pages that nobody wrote cost nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab: Tensor | None = None
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        with self._lock:
            if self._slab is None or self._used + num_bytes > self._slab.numel():
                self._slab, self._used = _map(max(num_bytes, _SLAB_BYTES)), 0
            part = self._slab[self._used : self._used + num_bytes]
            self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            return part


_slabs = _Slabs()


def empty_huge(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Like torch.empty. A large tensor on the CPU is in huge pages."""
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST:
        return torch.empty(shape, dtype=dtype)
    return _slabs.take(num_bytes).view(dtype).view(shape)


def touch(tensors: Iterable[Tensor]) -> None:
    """Have the system provide the memory of new tensors that are filled next, with all of torch's threads.

    Threads that fill a tensor together would meet at the same huge page, and each would clear one of its own for it.
    """
    ranges: list[list[int]] = []
    for start, num_bytes in sorted((t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"):
        if num_bytes < _SMALLEST:
            continue
        if ranges and start - ranges[-1][1] < _HUGE_PAGE:
            ranges[-1][1] = start + num_bytes
        else:
            ranges.append([start - start % mmap.PAGESIZE, start + num_bytes])
    parts = [
        (at, min(_TOUCHED_AT_ONCE, end - at)) for first, end in ranges for at in range(first, end, _TOUCHED_AT_ONCE)
    ]
    if parts and sys.platform == "linux":
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            # What an old system refuses is found when it is filled.
            list(pool.map(lambda part: madvise(*part, _MADV_POPULATE_WRITE), parts))


def _map(num_bytes: int) -> Tensor:
    mapping = mmap.mmap(
        -1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared has no huge pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE
    return whole[start : start + num_bytes]


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back to the system. Returns whether that worked.

    A training step or a prefill on the CPU makes and drops hundreds of tensors of a few MB. By default each of them is
    mapped, cleared page by page and unmapped again, which took a sixth of a training step's time when this was
    measured. It affects the whole process, so programs call it and libraries do not.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 1 << 26))
    return all(libc.mallopt(option, value) == 1 for option, value in settings)
