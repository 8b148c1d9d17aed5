"""Prefixes in the host's memory, for an engine whose cache lies in a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.engine.storage.disk_entry import Lengths, PrefixHasher, token_bytes
from qnext.engine.storage.owned import OwnedEntries
from qnext.errors import UsageError


class HostEntry(NamedTuple):
    kind: str
    salt: bytes
    owner: bytes
    tokens: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return 4 * len(self.tokens) + sum(tensor.nbytes for tensor in self.tensors.values())


class HostStore:
    """A `DiskStore` without a disk, for one thread: least recently used entries go first when `max_bytes` do not
    suffice, those of the owner that has most. `on_evict` is given each that goes. With `pinned`, memory that a GPU
    copies from without a detour.
    """

    def __init__(
        self, *, max_bytes: int, pinned: bool = False, on_evict: Callable[[HostEntry], None] | None = None
    ) -> None:
        if max_bytes <= 0:
            raise UsageError(f"the host's prefix cache of {max_bytes} bytes must be positive")
        self.max_bytes = max_bytes
        self._pinned = pinned
        self._on_evict = on_evict
        self._entries: dict[str, HostEntry] = {}
        self._owned = OwnedEntries(max_bytes)
        self._lengths: dict[tuple[str, bytes], Lengths] = {}

    @property
    def used_bytes(self) -> int:
        return self._owned.used_bytes

    def put(
        self, kind: str, salt: bytes, tokens: Sequence[int], tensors: Mapping[str, Tensor], *, owner: bytes = b""
    ) -> bool:
        """Copy the tensors; False when they do not fit what the owner may have of the store. An entry that is there
        counts as used."""
        name = PrefixHasher(b"", kind, salt).name(token_bytes(tokens))
        if name in self._entries:
            self._owned.touch(name)
            return True
        num_bytes = 4 * len(tokens) + sum(tensor.nbytes for tensor in tensors.values())
        victims = self._owned.victims(owner.hex(), num_bytes, max_bytes=self.max_bytes)
        if victims is None:
            return False
        for victim in victims:
            self._evict(victim)
        entry = HostEntry(
            kind, salt, owner, tuple(tokens), {key: self._copy(tensor) for key, tensor in tensors.items()}
        )
        self._entries[name] = entry
        self._owned.add(name, owner.hex(), num_bytes)
        self._lengths.setdefault((kind, salt), Lengths()).add(len(tokens))
        return True

    def get(self, kind: str, salt: bytes, tokens: Sequence[int]) -> dict[str, Tensor] | None:
        """The tensors of exactly these tokens: the store's own, not to be written to."""
        name = PrefixHasher(b"", kind, salt).name(token_bytes(tokens))
        entry = self._entries.get(name)
        if entry is None or (entry.kind, entry.salt, entry.tokens) != (kind, salt, tuple(tokens)):
            return None
        self._owned.touch(name)
        return entry.tensors

    def lengths(self, kind: str, salt: bytes, tokens: Sequence[int], *, limit: int) -> list[int]:
        """All p <= limit, ascending, for which the first p of the tokens are stored."""
        known = self._lengths.get((kind, salt))
        candidates = known.up_to(min(limit, len(tokens))) if known else []
        hasher, data = PrefixHasher(b"", kind, salt), token_bytes(tokens[: candidates[-1]] if candidates else ())
        return [length for length, name in hasher.names(data, candidates) if name in self._entries]

    def touch(self, kind: str, salt: bytes, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Those of the first so many tokens, ascending, count as used, the longest before the others."""
        hasher = PrefixHasher(b"", kind, salt)
        for _, name in reversed(list(hasher.names(token_bytes(tokens), lengths))):
            if name in self._entries:
                self._owned.touch(name)

    def held_bytes(self, owner: bytes) -> int:
        return self._owned.held.get(owner.hex(), 0)

    def clear(self) -> None:
        """Evict everything, what its owner used longest ago first."""
        for name in self._owned.in_order():
            self._evict(name)

    def _evict(self, name: str) -> None:
        entry = self._entries.pop(name)
        self._owned.remove(name)
        key = (entry.kind, entry.salt)
        if self._lengths[key].remove(len(entry.tokens)):
            del self._lengths[key]
        if self._on_evict is not None:
            self._on_evict(entry)

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        return copy.copy_(tensor)
