"""Numbers of cache blocks and state slots: who has which. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class IdPool:
    """The ids 0 .. size - 1, lent and taken back. The id freed longest ago is lent first."""

    def __init__(self, size: int, *, name: str) -> None:
        assert size >= 0
        self.size = size
        self.name = name
        self._free = deque(range(size))
        self._used: set[int] = set()
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        assert 0 <= count <= len(self._free), f"{self.name}: {count} wanted, {len(self._free)} free"
        ids = [self._free.popleft() for _ in range(count)]
        self._used.update(ids)
        return ids

    def free(self, ids: Iterable[int]) -> None:
        for index in ids:
            assert index in self._used, f"{self.name} {index} is freed but not lent"
            self._used.remove(index)
            self._free.append(index)
            self._freed.append(index)

    def drain_freed(self) -> tuple[int, ...]:
        """Ids freed since the last call, so that the cache can make their old content unreadable."""
        freed = tuple(self._freed)
        self._freed.clear()
        return freed

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Every id is free or lent, never both, and `owned` (all that the owners hold) is exactly what is lent."""
        owned = list(owned)
        free = set(self._free)
        assert len(free) == len(self._free), f"{self.name}: an id is free twice"
        assert len(set(owned)) == len(owned), f"{self.name}: an id has two owners"
        assert set(owned) == self._used, f"{self.name}: owners hold {sorted(owned)}, lent are {sorted(self._used)}"
        assert free.isdisjoint(self._used), f"{self.name}: an id is free and lent"
        assert len(free) + len(self._used) == self.size, f"{self.name}: an id is lost"
