"""What experts on disk, or on the host of a GPU, cost the steps of an engine. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qnext.ops import Residency
    from qnext.residency.hosted import HostedLayers


@dataclass(frozen=True)
class ExpertReads:
    """Experts that layers asked for, found in memory (hits) or read from disk (misses), and how long they waited. On a
    GPU, those found there, and those copied from the host, for which nothing waits that could be timed.

    Each layer of a step asks once for each expert that its tokens use. Where these are half of the layer's experts or
    more, as in a long prompt, it is a sweep and counted apart. Engines of one model share its memory for experts, and
    each sees the work of all.
    """

    hits: int
    misses: int
    sweep_hits: int
    sweep_misses: int
    bytes_read: int
    """Of misses, and of what is read or copied ahead."""

    seconds_waited: float | None
    sweep_seconds_waited: float | None
    num_resident: int
    """Experts that stay in memory, of all layers together, once it is full."""

    num_experts: int
    memory_bytes: int
    """For those that stay and for reads under way."""

    @classmethod
    def of(cls, residency: Residency | HostedLayers, before: Mapping[str, int]) -> ExpertReads:
        """Since the counts of `residency` were those. Takes microseconds; any thread may ask."""
        counts = residency.counts()

        def waited(name: str) -> float | None:
            return (counts[name] - before[name]) / 1e9 if name in counts else None

        return cls(
            hits=counts["hits"] - before["hits"],
            misses=counts["misses"] - before["misses"],
            sweep_hits=counts["sweep_hits"] - before["sweep_hits"],
            sweep_misses=counts["sweep_misses"] - before["sweep_misses"],
            bytes_read=(counts["reads"] - before["reads"]) * residency.record_bytes,
            seconds_waited=waited("wait_ns"),
            sweep_seconds_waited=waited("sweep_wait_ns"),
            num_resident=residency.num_slots,
            num_experts=residency.num_experts * len(residency.layers),
            memory_bytes=residency.nbytes,
        )

    def since(self, earlier: ExpertReads) -> ExpertReads:
        """What came after `earlier`."""
        return replace(
            self,
            hits=self.hits - earlier.hits,
            misses=self.misses - earlier.misses,
            sweep_hits=self.sweep_hits - earlier.sweep_hits,
            sweep_misses=self.sweep_misses - earlier.sweep_misses,
            bytes_read=self.bytes_read - earlier.bytes_read,
            seconds_waited=_less(self.seconds_waited, earlier.seconds_waited),
            sweep_seconds_waited=_less(self.sweep_seconds_waited, earlier.sweep_seconds_waited),
        )

    @property
    def all_hits(self) -> int:
        return self.hits + self.sweep_hits

    @property
    def all_misses(self) -> int:
        return self.misses + self.sweep_misses

    @property
    def all_seconds_waited(self) -> float | None:
        if self.seconds_waited is None or self.sweep_seconds_waited is None:
            return None
        return self.seconds_waited + self.sweep_seconds_waited

    @property
    def hit_ratio(self) -> float | None:
        """None where nothing was asked for."""
        asked = self.all_hits + self.all_misses
        return self.all_hits / asked if asked else None

    @property
    def resident_ratio(self) -> float:
        return self.num_resident / self.num_experts


def _less(seconds: float | None, earlier: float | None) -> float | None:
    return None if seconds is None or earlier is None else seconds - earlier
