"""Tensors of prompt prefixes on disk, for an engine that comes back after a restart.

An entry is a file, named by a hash of model, kind, salt and tokens; what it is of is in the file and compared when it
is read. What fails any check is deleted and counted, and the engine computes the prefix anew: nothing here raises
because of a file or a full disk. Writing is a thread's work, reading is the caller's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from qnext.engine.storage.disk_entry import (
    PREFIX,
    DamagedEntry,
    Header,
    Lengths,
    PrefixHasher,
    encode_body,
    encode_header,
    is_kind,
    make_header,
    token_bytes,
)
from qnext.engine.storage.disk_files import EntryFiles, is_passing
from qnext.engine.storage.disk_folder import check_size
from qnext.engine.storage.disk_statistics import DiskStatistics
from qnext.engine.storage.owned import OwnedEntries

QUEUE_BYTES = 256 << 20
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    name: str
    header: Header
    num_bytes: int
    body_B: Tensor | None = None  # until it is written


class _WriteJob(NamedTuple):
    """Files to delete, then an entry to write: in this order the folder never holds more than it may."""

    victims: list[_Entry]
    entry: _Entry


class DiskStore:
    """Least recently used entries go first when `max_bytes` (lengths of the files) do not suffice, those of the owner
    that has most: see OwnedEntries. Who owns an entry is in its file, so that a restart changes nothing.

    `fingerprint` stands for everything that an entry's bits depend on (`make_fingerprint`); entries of another one are
    deleted when the store is opened. The folder is new, empty or a store, and belongs to one store at a time. Raises
    UsageError when it is another's, writable by others, a link, in use, or no store. Methods may be called from
    several threads.
    """

    def __init__(
        self, folder: Path | str, *, max_bytes: int, fingerprint: bytes, queue_bytes: int = QUEUE_BYTES
    ) -> None:
        self.folder = Path(folder)
        check_size(self.folder, max_bytes)
        self._max_bytes = max_bytes
        self._queue_bytes = queue_bytes
        self._fingerprint = fingerprint
        self._index: dict[str, _Entry] = {}
        self._owned = OwnedEntries(max_bytes)
        self._lengths: dict[tuple[str, bytes], Lengths] = {}
        self._queued_bytes = 0
        self._queued_of: Counter[bytes] = Counter()  # bytes by owner
        self._counts: Counter[str] = Counter()
        self._has_warned = self._is_closing = self._is_busy = False
        self._jobs: deque[_WriteJob] = deque()
        self._touched: dict[str, int] = {}
        self._stamp = 0
        self._changed = threading.Condition(threading.RLock())
        with contextlib.ExitStack() as stack:
            self._files = stack.enter_context(contextlib.closing(EntryFiles(self.folder, fingerprint=fingerprint)))
            self._take_what_is_there()
            stack.pop_all()
        self._writer = threading.Thread(target=self._write_jobs, name="prefix-cache-writer", daemon=True)
        self._writer.start()

    def put(
        self, kind: str, salt: bytes, tokens: Sequence[int], tensors: Mapping[str, Tensor], *, owner: bytes = b""
    ) -> bool:
        """Copy the tensors and have them written. False when they do not fit what the owner may have of the store or,
        now, its queue.

        An entry that is there stays as it is and counts as used. `kind` is an identifier in ASCII.
        """
        assert len(tokens) and is_kind(kind), kind
        data = token_bytes(tokens)
        name = PrefixHasher(self._fingerprint, kind, salt).name(data)
        header = make_header(kind, salt, len(tokens), tensors, owner=owner)
        num_bytes = PREFIX.size + len(encode_header(header, self._fingerprint)) + header.body_bytes
        with self._changed:
            if self._is_closing:
                return False
            if name in self._index:
                self._touch(name)
                return True
            names = self._victims(owner, num_bytes)
            if names is None:
                self._counts["refused"] += 1
                return False
            # One entry is let into an empty queue whatever its size. Where others have entries, an owner has no more of
            # the queue than it leaves free.
            own_bytes = self._queued_of[owner] if len(self._owned.held) > (owner.hex() in self._owned.held) else 0
            if self._queued_bytes and self._queued_bytes + own_bytes + num_bytes > self._queue_bytes:
                self._counts["dropped"] += 1
                return False
            entry = _Entry(name, header, num_bytes, encode_body(header, data, tensors))
            victims = self._evict(names)
            self._add(entry)
            self._touch(name)
            self._queued_bytes += num_bytes
            self._queued_of[owner] += num_bytes
            self._jobs.append(_WriteJob(victims, entry))
            self._changed.notify_all()
            return True

    def get(self, kind: str, salt: bytes, tokens: Sequence[int]) -> dict[str, Tensor] | None:
        """The tensors of exactly these tokens, on the CPU, the caller's own; they share one piece of memory."""
        data = token_bytes(tokens)
        name = PrefixHasher(self._fingerprint, kind, salt).name(data)
        with self._changed:
            entry = self._index.get(name)
            if entry is None:
                self._counts["misses"] += 1
                return None
            queued_B = entry.body_B
        header, body_B = (entry.header, queued_B.clone()) if queued_B is not None else self._read(entry)
        with self._changed:
            if body_B is None or (header.kind, header.salt, header.tokens(body_B)) != (kind, salt, data):
                self._counts["misses"] += 1
                return None
            self._counts["hits"] += 1
            if self._index.get(name) is entry:
                self._touch(name)
        return header.tensors(body_B)

    def lengths(self, kind: str, salt: bytes, tokens: Sequence[int], *, limit: int) -> list[int]:
        """All p <= limit, ascending, for which the first p of the tokens are stored. Reads no file."""
        with self._changed:
            known = self._lengths.get((kind, salt))
            candidates = known.up_to(min(limit, len(tokens))) if known else []
            if not candidates:
                return []
            data = token_bytes(tokens[: candidates[-1]])
            hasher = PrefixHasher(self._fingerprint, kind, salt)
            return [length for length, name in hasher.names(data, candidates) if name in self._index]

    def longest(self, kind: str, salt: bytes, tokens: Sequence[int], *, limit: int) -> int:
        """The largest of `lengths`, or 0. `get` may still find that entry damaged."""
        return max(self.lengths(kind, salt, tokens, limit=limit), default=0)

    def touch(self, kind: str, salt: bytes, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        """Those of the first so many tokens, ascending, count as used, the longest before the others."""
        hasher, data = PrefixHasher(self._fingerprint, kind, salt), token_bytes(tokens)
        names = [name for _, name in hasher.names(data, lengths)]
        with self._changed:
            for name in reversed(names):
                if name in self._index:
                    self._touch(name)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def has_failed(self) -> bool:
        """Whether a file could not be written since the store was opened."""
        return self._counts["failed_writes"] > 0

    def held_bytes(self, owner: bytes) -> int:
        return self._owned.held.get(owner.hex(), 0)

    def statistics(self) -> DiskStatistics:
        with self._changed:
            counted = DiskStatistics._fields[4:]
            counts = {name: self._counts[name.removeprefix("num_")] for name in counted}
            return DiskStatistics(
                len(self._index), self._owned.used_bytes, self._max_bytes, self._queued_bytes, **counts
            )

    def flush(self) -> None:
        """Wait until everything that was put is on disk, or has failed to be."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._jobs or self._touched or self._is_busy))

    def close(self) -> None:
        """Write what waits, then let the folder go. The store is empty from then on and takes nothing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._writer.join()
        with self._changed:
            self._index.clear()
            self._owned = OwnedEntries(self._max_bytes)
            self._lengths.clear()
            self._files.close()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The index. Called under the lock.

    def _add(self, entry: _Entry) -> None:
        self._index[entry.name] = entry
        self._owned.add(entry.name, entry.header.owner.hex(), entry.num_bytes)
        key = (entry.header.kind, entry.header.salt)
        self._lengths.setdefault(key, Lengths()).add(entry.header.num_tokens)

    def _forget(self, entry: _Entry) -> None:
        del self._index[entry.name]
        self._owned.remove(entry.name)
        key = (entry.header.kind, entry.header.salt)
        if self._lengths[key].remove(entry.header.num_tokens):
            del self._lengths[key]

    def _touch(self, name: str) -> None:
        """The time of its last use is now. The clock may step back; the order of uses may not."""
        self._owned.touch(name)
        self._stamp = max(time.time_ns(), self._stamp + 1)
        self._touched[name] = self._stamp
        self._changed.notify_all()

    def _victims(self, owner: bytes, num_bytes: int) -> list[str] | None:
        """Names of what has to go before an owner has so many bytes more; None where it must do without."""
        return self._owned.victims(owner.hex(), num_bytes, max_bytes=self._max_bytes - self._files.stuck_bytes)

    def _evict(self, names: Sequence[str]) -> list[_Entry]:
        victims = [self._index[name] for name in names]
        for victim in victims:
            self._forget(victim)
        self._counts["evicted"] += len(victims)
        return victims

    # The folder.

    def _take_what_is_there(self) -> None:
        found = self._files.scan()
        self._counts["damaged"] += found.num_damaged
        self._counts["foreign"] += found.num_foreign
        for self._stamp, name, header, num_bytes in found.entries:
            self._add(_Entry(name, header, num_bytes))
        for victim in self._evict(self._victims(b"", 0) or ()):
            self._files.remove(victim.name)

    def _read(self, entry: _Entry) -> tuple[Header, Tensor | None]:
        """The file's own header and its verified body. Nothing where the file is gone; deletes what is damaged."""
        try:
            return self._files.read(entry.name)
        except (DamagedEntry, OSError, RuntimeError) as error:  # torch has a RuntimeError for lack of memory
            if is_passing(error):
                return entry.header, None
            with self._changed:
                if self._index.get(entry.name) is entry:
                    self._forget(entry)
                    if not isinstance(error, FileNotFoundError):
                        self._counts["damaged"] += 1
                        self._files.remove(entry.name)
            return entry.header, None

    # The writer's thread.

    def _write_jobs(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._touched or self._is_closing)
                if not self._jobs and not self._touched:
                    return
                job = self._jobs.popleft() if self._jobs else None
                self._is_busy = True
            if job is not None:
                for victim in job.victims:
                    self._files.remove(victim.name)
                self._write(job.entry)
                continue
            with self._changed:
                touched, self._touched = self._touched, {}
            for name, stamp in touched.items():
                self._files.touch(name, stamp)

    def _write(self, entry: _Entry) -> None:
        error: OSError | None = None
        with self._changed:
            is_wanted = self._index.get(entry.name) is entry
            fits = self._owned.used_bytes <= self._max_bytes - self._files.stuck_bytes
        try:
            if is_wanted and not fits:
                raise OSError(errno.EDQUOT, "evicted files cannot be deleted")
            if is_wanted:
                assert entry.body_B is not None
                self._files.write(entry.name, entry.header, entry.body_B)
        except OSError as caught:
            error = caught
        with self._changed:
            entry.body_B = None
            self._queued_bytes -= entry.num_bytes
            self._queued_of[entry.header.owner] -= entry.num_bytes
            if not self._queued_of[entry.header.owner]:
                del self._queued_of[entry.header.owner]
            self._counts["written"] += is_wanted and error is None
            self._counts["failed_writes"] += error is not None
            if error is not None and self._index.get(entry.name) is entry:
                self._forget(entry)
        if error is not None and not self._has_warned:
            self._has_warned = True
            _log.warning("prefix cache %s: %s; entries are lost", self.folder, error.strerror)
