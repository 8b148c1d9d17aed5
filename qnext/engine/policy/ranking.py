"""Things in the order in which they go, and how much of what there is each owner holds. No torch."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Generator, Hashable, Iterator
from contextlib import closing
from typing import Any, Generic, Protocol, TypeVar

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
    """How many of `size` things of one kind each owner holds: blocks, slots, bytes.

    The share of an owner is an equal part, by the number of owners that hold something. Whoever holds more may keep it
    for as long as nobody needs it. Written by one thread; `held` may be copied by any.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: dict[str, int] = {}
        self._largest: Ranking[str] = Ranking()  # as of the last time that somebody asked
        self._num_ranked = 0
        self._changed: dict[str, None] = {}  # owners since then, who added something last at the end

    def add(self, owner: str, count: int) -> None:
        if not count:
            return
        held = self.held.get(owner, 0) + count
        assert held >= 0, f"{owner!r} holds {held}"
        if held:
            self.held[owner] = held
        else:
            del self.held[owner]
        if count > 0:
            self._changed.pop(owner, None)
        self._changed[owner] = None

    @property
    def share(self) -> int:
        return self.size // max(1, len(self.held))

    def excess(self, owner: str) -> int:
        """How much more than its share an owner holds; 0 where it holds less."""
        return max(0, self.held.get(owner, 0) - self.share)

    def largest_first(self, is_usable: Callable[[str], bool]) -> Generator[str, None, None]:
        """Owners by what they hold, the largest first, as things are when each is given out; among equals the one that
        has added nothing for longest. One that is still usable afterwards comes up again."""
        self._rank_changed()
        with closing(self._largest.least_first(is_usable)) as owners:
            for owner in owners:
                yield owner
                self._rank_changed()

    def _rank_changed(self) -> None:
        for owner in self._changed:
            self._num_ranked += 1
            if owner in self.held:
                self._largest.rank(owner, (-self.held[owner], self._num_ranked))
            else:
                self._largest.discard(owner)
        self._changed.clear()


class Owned(Hashable, Protocol):
    @property
    def owner(self) -> str: ...


OwnedThing = TypeVar("OwnedThing", bound=Owned)


class OwnerRankings(Generic[OwnedThing]):
    """One `Ranking` for each owner."""

    def __init__(self) -> None:
        self._of: dict[str, Ranking[OwnedThing]] = {}

    def __iter__(self) -> Iterator[OwnedThing]:
        return itertools.chain.from_iterable(self._of.values())

    def __contains__(self, thing: OwnedThing) -> bool:
        return thing.owner in self._of and thing in self._of[thing.owner]

    def rank(self, thing: OwnedThing, key: Any) -> None:
        ranking = self._of.get(thing.owner)
        if ranking is None:
            ranking = self._of[thing.owner] = Ranking()
        ranking.rank(thing, key)

    def key(self, thing: OwnedThing) -> Any:
        return self._of[thing.owner].key(thing)

    def discard(self, thing: OwnedThing) -> None:
        ranking = self._of.get(thing.owner)
        if ranking is not None:
            ranking.discard(thing)
            if not ranking:
                del self._of[thing.owner]

    def remove_until(
        self,
        is_enough: Callable[[], bool],
        *,
        owner: str,
        is_usable: Callable[[OwnedThing], bool],
        remove: Callable[[OwnedThing], object],
    ) -> None:
        """Remove usable things of an owner, the least first, until it is enough or none is left."""
        has_removed = True
        while has_removed and owner in self._of:  # another ranking, where it was empty meanwhile
            has_removed = False
            with closing(self._of[owner].least_first(is_usable)) as things:
                for thing in things:
                    if is_enough():
                        return
                    remove(thing)
                    has_removed = True

    def clear(self) -> None:
        self._of.clear()


def take_in_turn(
    holdings: Holdings,
    take: Callable[[str, Callable[[], bool]], None],
    *,
    is_enough: Callable[[], bool],
    owner: str,
    exposed: Collection[str] | None,
) -> None:
    """Have `take(owner, until)` remove things until it is enough, or until no more is to be had for `owner`.

    Whoever holds most gives first, down to its share. Then `owner` gives of its own, and at last those that are
    `exposed`, in their order; None exposes all, the largest first.
    """
    stuck: set[str] = set()

    def take_from_largest(least: Callable[[], int]) -> None:
        with closing(holdings.largest_first(lambda other: other not in stuck)) as others:
            for other in others:

                def until(other: str = other) -> bool:
                    return is_enough() or holdings.held.get(other, 0) <= least()

                if until():
                    return
                take(other, until)
                if not until():
                    stuck.add(other)  # the rest of it is in use

    take_from_largest(lambda: holdings.share)
    for other in (owner, *(exposed or ())):
        take(other, is_enough)
    if exposed is None:
        stuck.clear()
        take_from_largest(lambda: 0)
