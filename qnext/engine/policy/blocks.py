"""Numbers of cache blocks and state slots: who has which. No torch."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator

from qnext.engine.policy.ranking import Holdings


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

    def free_again(self, ids: Iterable[int]) -> None:
        """What `drain_freed` gave may not have been made unreadable: give it again where it is still free."""
        self._freed += [index for index in ids if index not in self._used]

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
    """An `IdPool` whose ids may have several owners; an id comes back when the last of them lets go.

    One owner is the keeper: it holds on with `keep` and lets go with `drop`, and what only the keeper holds is loose.
    `num_releases` counts what the others let go of: what there was no room for before need not be tried
    again until then, for what the keeper drops was loose and had been counted on.

    Each id counts for the account that it was lent to until it comes back, whoever holds it by then: `holdings` says
    how many each has, `loose` how many of them are loose.
    """

    def __init__(self, size: int, *, name: str) -> None:
        super().__init__(size, name=name)
        self.num_releases = 0
        self.holdings = Holdings(size)
        self.loose: dict[str, int] = {}
        self._account: dict[int, str] = {}
        self._num_owners: dict[int, int] = {}
        self._num_kept: dict[int, int] = {}  # how often the keeper is among the owners

    def num_owners(self, index: int) -> int:
        return self._num_owners.get(index, 0)

    def is_loose(self, index: int) -> bool:
        """Whether nobody but the keeper holds it."""
        return self._num_owners.get(index) == self._num_kept.get(index, 0)

    @property
    def num_loose(self) -> int:
        return sum(self.loose.values())

    def num_in_reach(self, owner: str, exposed: Collection[str] | None) -> int:
        """How many loose ids `take_in_turn` could give at most, with the same arguments."""
        if exposed is None:
            return self.num_loose
        share, held = self.holdings.share, self.holdings.held
        return sum(
            num_loose if other == owner or other in exposed else min(num_loose, max(0, held[other] - share))
            for other, num_loose in self.loose.items()
        )

    @property
    def num_kept(self) -> int:
        return len(self._num_kept)

    def kept(self) -> Iterator[int]:
        """Every id once for each share of the keeper."""
        return itertools.chain.from_iterable(itertools.repeat(index, n) for index, n in self._num_kept.items())

    def allocate(self, count: int, account: str = "") -> list[int]:
        ids = super().allocate(count)
        self._num_owners.update(dict.fromkeys(ids, 1))
        self._account.update(dict.fromkeys(ids, account))
        self.holdings.add(account, count)
        return ids

    def share(self, ids: Iterable[int]) -> None:
        """One more owner for each id, all of which must be lent."""
        for index in ids:
            assert index in self._used, f"{self.name} {index} is shared but not lent"
            num_owners = self._num_owners[index]
            if num_owners == self._num_kept.get(index):
                self._count_loose(index, -1)
            self._num_owners[index] = num_owners + 1

    def free(self, ids: Iterable[int]) -> None:
        """One owner of each id, not the keeper, lets go."""
        gone = []
        for index in ids:
            self.num_releases += 1
            assert self._num_owners.get(index), f"{self.name} {index} is freed but not lent"
            num_owners = self._num_owners[index] = self._num_owners[index] - 1
            if not num_owners:
                gone.append(index)
            elif num_owners == self._num_kept.get(index):
                self._count_loose(index, 1)
        self._take_back(gone)

    def keep(self, index: int) -> None:
        """The keeper is one more owner of an id that somebody holds."""
        assert index in self._used, f"{self.name} {index} is kept but not lent"
        self._num_owners[index] += 1
        self._num_kept[index] = self._num_kept.get(index, 0) + 1

    def drop(self, index: int) -> bool:
        """Undo one `keep`; returns whether the id came back."""
        was_loose = self.is_loose(index)
        self._num_owners[index] -= 1
        self._num_kept[index] -= 1
        if not self._num_kept[index]:
            del self._num_kept[index]
        if self._num_owners[index]:
            return False
        self._count_loose(index, -was_loose)
        self._take_back([index])
        return True

    def _count_loose(self, index: int, change: int) -> None:
        account = self._account[index]
        self.loose[account] = self.loose.get(account, 0) + change
        if not self.loose[account]:
            del self.loose[account]

    def _take_back(self, ids: list[int]) -> None:
        """Nobody holds these any more."""
        counts: dict[str, int] = {}
        for index in ids:
            del self._num_owners[index]
            account = self._account.pop(index)
            counts[account] = counts.get(account, 0) + 1
        for account, count in counts.items():
            self.holdings.add(account, -count)
        super().free(ids)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """As in `IdPool`, but `owned` names an id once for each of its owners."""
        owners = Counter(owned)
        super().check_integrity(owners)
        assert owners == self._num_owners, f"{self.name}: owners are {dict(owners)}, counted are {self._num_owners}"
        assert all(0 < n <= owners[index] for index, n in self._num_kept.items()), f"{self.name}: kept by too many"
        loose = Counter(self._account[index] for index, n in self._num_kept.items() if owners[index] == n)
        assert loose == self.loose, f"{self.name}: {loose} are loose, counted are {self.loose}"
        held = Counter(self._account.values())
        assert held == self.holdings.held, f"{self.name}: {held} are held, counted are {self.holdings.held}"
