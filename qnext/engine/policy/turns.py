"""Whose turn it is: requests that wait, by owner, and how many of each owner run. No torch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing

from qnext.engine.policy.ranking import Holdings, Ranking
from qnext.engine.policy.sequence import Sequence


class Turns:
    """First come, first served among the requests of one owner; of the owners, the one that has fewest running is next,
    among equals the one that began nothing for longest.

    `seats` is how many of the requests that may run at once each owner has by now.
    """

    def __init__(self, num_seats: int) -> None:
        self.seats = Holdings(num_seats)
        self._waiting: dict[str, deque[Sequence]] = {}
        self._order: Ranking[str] = Ranking()  # of owners that wait
        self._began: dict[str, int] = {}  # owners that wait or run: when each began a request last
        self._read: dict[str, int] = {}  # the same owners: when a prompt of each was read last
        self._count = itertools.count(1)
        self._num_waiting = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(self._waiting.values())

    def has_work(self, owner: str) -> bool:
        return owner in self._began

    def num_running(self, owner: str) -> int:
        return self.seats.held.get(owner, 0)

    def waiting_of(self, owner: str) -> deque[Sequence]:
        return self._waiting.get(owner, deque())

    def num_waiting_by_owner(self) -> dict[str, int]:
        """Any thread may ask."""
        return {owner: len(queue) for owner, queue in list(self._waiting.items())}

    def append(self, sequence: Sequence) -> None:
        self._queue_of(sequence.owner).append(sequence)
        self._note(sequence.owner, 1)

    def put_back(self, sequence: Sequence) -> None:
        """Before all others of its owner."""
        self._queue_of(sequence.owner).appendleft(sequence)
        self._note(sequence.owner, 1)

    def remove(self, sequence: Sequence) -> None:
        self._waiting[sequence.owner].remove(sequence)
        self._note(sequence.owner, -1)

    def next(self, is_open: Callable[[Sequence], bool] = lambda sequence: True) -> Sequence | None:
        """The first request of the next owner whose first one `is_open`. It stays in the queue."""
        if not self._waiting:
            return None
        with closing(self._order.least_first(lambda owner: is_open(self._waiting[owner][0]))) as owners:
            owner = next(owners, None)
        return None if owner is None else self._waiting[owner][0]

    def begin(self, sequence: Sequence) -> None:
        """It runs; it has left the queue."""
        self.seats.add(sequence.owner, 1)
        self._began[sequence.owner] = next(self._count)
        self._note(sequence.owner, 0)

    def end(self, sequence: Sequence) -> None:
        """It runs no more."""
        self.seats.add(sequence.owner, -1)
        self._note(sequence.owner, 0)

    def note_read(self, owner: str) -> None:
        """A chunk of a prompt of this owner is planned."""
        self._read[owner] = next(self._count)

    def last_read(self, owner: str) -> int:
        """When that was, in no unit."""
        return self._read.get(owner, 0)

    def check_integrity(self, running: list[Sequence]) -> None:
        owners = {sequence.owner for sequence in running}
        assert set(self._order) == set(self._waiting) and self._num_waiting == sum(1 for _ in self)
        assert all(self._waiting.values()) and set(self._began) == owners | set(self._waiting)
        counted = {owner: sum(sequence.owner == owner for sequence in running) for owner in owners}
        assert counted == self.seats.held, f"{counted} run, counted are {self.seats.held}"

    def _queue_of(self, owner: str) -> deque[Sequence]:
        if owner not in self._waiting:
            self._waiting[owner] = deque()
        return self._waiting[owner]

    def _note(self, owner: str, change: int) -> None:
        """So many more wait; rank the owner anew."""
        self._num_waiting += change
        if self._waiting.get(owner):
            self._order.rank(owner, (self.num_running(owner), self._began.setdefault(owner, 0)))
            return
        self._waiting.pop(owner, None)
        self._order.discard(owner)
        if not self.num_running(owner):
            self._began.pop(owner, None)
            self._read.pop(owner, None)
