"""Experts from disk beside llama.cpp, which maps its file into memory: the same weights, memory, threads and disk.

Every figure of every contestant has a process of its own that begins with an empty page cache; the contestants take
turns. Where each may use less memory than the machine has, the rest is locked away: neither programs nor the page cache
can have it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from qnext.bench.contest import ratios, spread
from qnext.bench.files import cached_share
from qnext.bench.llama import LlamaBench
from qnext.bench.plan import LLAMA_CPP, QNEXT
from qnext.bench.table import format_ratio
from qnext.errors import DoesNotFit
from qnext.planning import machine
from qnext.planning.machine import format_bytes

# Weights stay in the mapped file, in its order: in another one, which llama.cpp would make for this processor, they are
# memory of its own and do not fit. It repacks all of them or none.
MAPPED = ("-lm", "mmap", "--repack", "0")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Figure(NamedTuple):
    """A prefill of `length` tokens, or decoding after so many."""

    kind: str
    length: int

    @property
    def name(self) -> str:
        return f"prefill {self.length}" if self.kind == "prefill" else f"decode after {self.length}"


def drop_page_cache(files: Sequence[Path]) -> float | None:
    """Forget cached pages: all of them where the system lets us, else those of `files`. The share of their pages that
    is cached still."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3\n")
    except OSError:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return cached_share(list(files))


@contextmanager
def locked_away(num_bytes: int) -> Iterator[None]:
    """Hold so much memory that the system can neither give away nor write out. Raises DoesNotFit."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        first = ctypes.c_char.from_buffer(held)
        address = ctypes.c_void_p(ctypes.addressof(first))
        del first  # while it is there the memory cannot be closed
        if libc.mlock(address, ctypes.c_size_t(num_bytes)):
            reason = os.strerror(ctypes.get_errno())
            raise DoesNotFit(f"{format_bytes(num_bytes)} of memory cannot be locked: {reason}; see `ulimit -l`")
        yield


def read_ahead_bytes(path: Path) -> int | None:
    """What the system reads around a page of this file that is not in memory; None where it does not say."""
    device = path.stat().st_dev
    try:
        text = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
    except OSError:
        return None
    return int(text) * 1024


def compare(
    ours: Callable[[Figure], dict[str, Any]],
    llama: LlamaBench,
    figures: Sequence[Figure],
    *,
    files: Sequence[Path],
    memory_bytes: int | None,
    decode_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """`ours` runs a figure in a fresh process and answers with its row. Each contestant may use `memory_bytes`, or what
    the machine has. Raises DoesNotFit where less than that is free."""
    drop_page_cache(files)
    free_bytes = machine.available_bytes()
    surplus = 0 if memory_bytes is None else free_bytes - memory_bytes
    if surplus < 0:
        raise DoesNotFit(f"{format_bytes(free_bytes)} of memory are free, --memory wants {format_bytes(-surplus)} more")
    rates: dict[Figure, dict[str, list[float]]] = {figure: {QNEXT: [], LLAMA_CPP: []} for figure in figures}
    rows, shares = [], []
    with locked_away(surplus) if surplus else nullcontext():
        free_bytes = machine.available_bytes()
        print(f"{format_bytes(free_bytes)} of memory for each, {format_bytes(surplus)} are locked away", flush=True)
        for round_ in range(1, rounds + 1):
            for figure in figures:
                shares.append(drop_page_cache(files))
                rows.append({"round": round_, **ours(figure)})
                rates[figure][QNEXT].append(rows[-1]["tokens_per_second"])
                shares.append(drop_page_cache(files))
                num_tokens = figure.length if figure.kind == "prefill" else decode_tokens
                rates[figure][LLAMA_CPP].append(num_tokens / llama.step(*figure))
                both = ", ".join(f"{name} {values[-1]:.2f}" for name, values in rates[figure].items())
                print(f"round {round_}  {figure.name:<20}{both} tokens/s", flush=True)
    return {
        "free_bytes": free_bytes,
        "locked_bytes": surplus,
        "read_ahead_bytes": read_ahead_bytes(llama.gguf),
        "cached_share_before_each": shares,
        "figures": [_summary(figure, both) for figure, both in rates.items()],
        "rows": rows,
        "llama.cpp": {**llama.facts(), "options": MAPPED},
    }


def _summary(figure: Figure, both: dict[str, list[float]]) -> dict[str, Any]:
    ratio = ratios(both[QNEXT], both[LLAMA_CPP])
    medians = ", ".join(f"{name} {spread(values)['median']:.2f}" for name, values in both.items())
    print(f"{figure.name:<20}{medians} tokens/s, {format_ratio(ratio)} times as fast")
    return {"figure": figure.name, **{name: spread(values) for name, values in both.items()}, "ratio": ratio}
