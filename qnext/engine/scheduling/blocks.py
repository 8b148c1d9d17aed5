"""Numbers of cache blocks and state slots: who has which. No torch."""

from __future__ import annotations

from collections import Counter, deque
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


class RefPool(IdPool):
    """An `IdPool` whose ids may have several owners; an id comes back when the last of them lets go."""

    def __init__(self, size: int, *, name: str) -> None:
        super().__init__(size, name=name)
        self._num_owners: dict[int, int] = {}

    def num_owners(self, index: int) -> int:
        return self._num_owners.get(index, 0)

    def allocate(self, count: int) -> list[int]:
        ids = super().allocate(count)
        self._num_owners.update(dict.fromkeys(ids, 1))
        return ids

    def share(self, ids: Iterable[int]) -> None:
        """One more owner for each id, all of which must be lent."""
        for index in ids:
            assert index in self._used, f"{self.name} {index} is shared but not lent"
            self._num_owners[index] += 1

    def free(self, ids: Iterable[int]) -> None:
        """One owner of each id lets go."""
        for index in ids:
            assert index in self._used, f"{self.name} {index} is freed but not lent"
            self._num_owners[index] -= 1
            if not self._num_owners[index]:
                del self._num_owners[index]
                super().free([index])

    def check_integrity(self, owned: Iterable[int]) -> None:
        """As in `IdPool`, but `owned` names an id once for each of its owners."""
        owners = Counter(owned)
        super().check_integrity(owners)
        assert owners == self._num_owners, f"{self.name}: owners are {dict(owners)}, counted are {self._num_owners}"
