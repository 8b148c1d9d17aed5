"""Entries of a store by use and by owner: which goes when another needs room. No torch."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from qnext.engine.policy.ranking import Holdings


class _OwnedSize(NamedTuple):
    owner: str
    num_bytes: int


class OwnedEntries:
    """Names of entries with their owners and sizes, least recently used first.

    An owner alone may use all `max_bytes`. When room is short, the owner that holds most loses what it used longest
    ago, down to an equal share by the number of owners; what others have within theirs stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: dict[str, _OwnedSize] = {}
        self._names: dict[str, OrderedDict[str, None]] = {}  # by owner, least recently used first
        self._holdings = Holdings(max_bytes)
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def held(self) -> dict[str, int]:
        """Bytes of each owner."""
        return self._holdings.held

    def add(self, name: str, owner: str, num_bytes: int) -> None:
        """As the one that was used last."""
        self._entries[name] = _OwnedSize(owner, num_bytes)
        self._names.setdefault(owner, OrderedDict())[name] = None
        self._holdings.add(owner, num_bytes)
        self.used_bytes += num_bytes

    def touch(self, name: str) -> None:
        self._names[self._entries[name].owner].move_to_end(name)

    def remove(self, name: str) -> None:
        owner, num_bytes = self._entries.pop(name)
        names = self._names[owner]
        del names[name]
        if not names:
            del self._names[owner]
        self._holdings.add(owner, -num_bytes)
        self.used_bytes -= num_bytes

    def in_order(self) -> list[str]:
        """All names, those of each owner one after another."""
        return [name for names in self._names.values() for name in names]

    def victims(self, owner: str, num_bytes: int, *, max_bytes: int) -> list[str] | None:
        """What has to go so that an owner can add so many bytes; None where that would take others' shares."""
        found: list[str] = []
        excess = self.used_bytes + num_bytes - max_bytes
        if excess <= 0:
            return found
        queues = {other: iter(names) for other, names in self._names.items()}
        held = Holdings(max_bytes)
        for other, count in self._holdings.held.items():
            held.add(other, count)
        held.add(owner, num_bytes)
        for largest in held.largest_first(lambda other: True):
            name = next(queues.get(largest, iter(())), None)
            if name is None:
                return None
            found.append(name)
            held.add(largest, -self._entries[name].num_bytes)
            excess -= self._entries[name].num_bytes
            if excess <= 0:
                return found
        return None
