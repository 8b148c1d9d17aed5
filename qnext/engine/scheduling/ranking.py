"""Things in the order in which they go, and how much of the cache each owner of a salt holds. No torch."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Generator, Hashable, Iterator
from contextlib import closing
from typing import Any, Generic, TypeVar

Thing = TypeVar("Thing", bound=Hashable)


class Ranking(Generic[Thing]):
    """Things by a key that may change, the least first; among equals the one that came first.

    A heap whose outdated entries are passed over when they come up, so that a change costs one push.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, Thing]] = []
        self._entries: dict[Thing, tuple[Any, int, Thing]] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Thing]:
        return iter(self._entries)

    def __contains__(self, thing: object) -> bool:
        return thing in self._entries

    def rank(self, thing: Thing, key: Any) -> None:
        """Add it, or give it another key."""
        known = self._entries.get(thing)
        if known is not None and known[0] == key:
            return
        entry = self._entries[thing] = (key, known[1] if known else next(self._count), thing)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def key(self, thing: Thing) -> Any:
        return self._entries[thing][0]

    def discard(self, thing: Thing) -> None:
        self._entries.pop(thing, None)

    def least_first(self, is_usable: Callable[[Thing], bool]) -> Generator[Thing, None, None]:
        """Those that are usable when they come up. They may be ranked and discarded meanwhile; one that is given out
        and stays comes up again."""
        aside: list[tuple[Any, int, Thing]] = []
        try:
            while self._heap:
                entry = self._heap[0]
                if self._entries.get(entry[2]) is not entry:
                    heapq.heappop(self._heap)
                elif is_usable(entry[2]):
                    yield entry[2]
                else:
                    aside.append(heapq.heappop(self._heap))
        finally:
            for entry in aside:
                heapq.heappush(self._heap, entry)

    def clear(self) -> None:
        self._heap.clear()
        self._entries.clear()


class Holdings:
    """How many of one kind of thing each salt holds. More than `max_fraction` of all is too much.

    With a fraction of 1 nothing is too much, and nothing is counted.
    """

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.is_bounded = max_fraction < 1
        self.total = 0
        self.held: Counter[str] = Counter()

    def add(self, salt: str, count: int) -> None:
        if not self.is_bounded:
            return
        self.total += count
        self.held[salt] += count
        if not self.held[salt]:
            del self.held[salt]

    def is_too_much(self, salt: str) -> bool:
        return self.held[salt] > self.max_fraction * self.total

    def greediest(self, excluded: Collection[str]) -> str | None:
        """The salt that holds most, if that is too much. O(salts)."""
        salt = max((s for s in self.held if s not in excluded), key=self.held.__getitem__, default=None)
        return salt if salt is not None and self.is_too_much(salt) else None

    def clear(self) -> None:
        self.total = 0
        self.held.clear()


class SaltRanking(Ranking[Thing]):
    """A `Ranking` of all and, where salts are bounded, one for each salt."""

    def __init__(self, *, is_bounded: bool) -> None:
        super().__init__()
        self.is_bounded = is_bounded
        self._of: dict[str, Ranking[Thing]] = {}

    def of(self, salt: str) -> Ranking[Thing]:
        return self._of.get(salt, Ranking())

    def num_of_salts(self) -> int:
        return sum(map(len, self._of.values()))

    def rank_for(self, salt: str, thing: Thing, key: Any) -> None:
        self.rank(thing, key)
        if self.is_bounded:
            self._of.setdefault(salt, Ranking()).rank(thing, key)

    def discard_for(self, salt: str, thing: Thing) -> None:
        self.discard(thing)
        if salt in self._of:
            self._of[salt].discard(thing)
            if not self._of[salt]:
                del self._of[salt]

    def remove_until(
        self,
        is_enough: Callable[[], bool],
        *,
        is_usable: Callable[[Thing], bool],
        remove: Callable[[Thing], object],
        holdings: Holdings,
    ) -> None:
        """Remove usable things, the least first, of salts that hold too much before all others, until it is enough or
        none is left."""
        stuck: set[str] = set()
        while not is_enough():
            salt = holdings.greediest(stuck)
            ranking = self if salt is None else self.of(salt)
            has_removed = False
            with closing(ranking.least_first(is_usable)) as things:
                for thing in things:
                    remove(thing)
                    has_removed = True
                    if is_enough() or (salt is not None and not holdings.is_too_much(salt)):
                        break
            if not has_removed:
                if salt is None:
                    return
                stuck.add(salt)

    def clear(self) -> None:
        super().clear()
        self._of.clear()
