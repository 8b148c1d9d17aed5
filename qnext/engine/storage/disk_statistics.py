"""What a disk store counts."""

from __future__ import annotations

from typing import NamedTuple


class DiskStatistics(NamedTuple):
    """Counts since the store was opened; `num_entries` and the bytes are those of now.

    `num_dropped` found the queue full, `num_refused` were larger than the whole store, `num_damaged` files were not
    whole entries of this model and were deleted, `num_foreign` names in the folder are none of the store's and were
    left alone.
    """

    num_entries: int
    entry_bytes: int
    max_bytes: int
    queued_bytes: int
    num_hits: int
    num_misses: int
    num_written: int
    num_evicted: int
    num_dropped: int
    num_refused: int
    num_damaged: int
    num_foreign: int
    num_failed_writes: int
