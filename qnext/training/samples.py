"""Tokenised samples as endless micro batches: whole samples, mixed by weight, in an order that a seed fixes.

A sample is never cut and never sees another. A micro batch holds as many as fit; there is no padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.text.lessons import Lesson
from qnext.training.data import Document, DocumentRows, TrainBatch, pack


class Samples(Protocol):
    """A sequence of samples, such as a shard."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class SampleKind(Protocol):
    """What a sample is: how many rows it takes, and how whole samples become one micro batch."""

    def num_rows(self, sample: Any) -> int: ...

    def pack(self, samples: Sequence[Any]) -> Any: ...


class DocumentKind:
    """Samples that are documents, and a TrainBatch of them."""

    def num_rows(self, sample: Document) -> int:
        return len(sample) - 1

    def pack(self, samples: Sequence[Document]) -> TrainBatch:
        return pack([DocumentRows(document, 0, len(document) - 1) for document in samples])


DOCUMENTS = DocumentKind()


class SampleSet:
    """The samples of one source, in an order of its own for each epoch. `parts` are sequences of samples of a kind."""

    def __init__(
        self, parts: Sequence[Samples], numbers: np.ndarray | None = None, *, kind: SampleKind = DOCUMENTS
    ) -> None:
        """`numbers` of the samples that belong to it, of all in `parts`; None: all of them."""
        self._parts, self.kind = parts, kind
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._numbers = np.arange(self._starts[-1]) if numbers is None else numbers
        self.num_rows = sum(kind.num_rows(self[index]) for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        number = int(self._numbers[index])
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._parts[part][number - int(self._starts[part])]

    def split(self, share: float) -> tuple[SampleSet, SampleSet]:
        """(train, held out). The hash of a sample's number decides; at least one sample stays to train on."""
        is_held_out = _mixed(self._numbers.astype(np.uint64)) < np.uint64(int(share * (2**64 - 1)))
        if is_held_out.all():
            is_held_out[:1] = False
        train, held_out = (
            SampleSet(self._parts, self._numbers[chosen], kind=self.kind) for chosen in (~is_held_out, is_held_out)
        )
        return train, held_out

    def order(self, key: str) -> np.ndarray:
        """A permutation that `key` fixes: by the hashes of the samples' numbers."""
        salt = np.uint64(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
        return np.argsort(_mixed(np.arange(len(self), dtype=np.uint64) ^ salt), kind="stable")


def in_order(samples: Iterable[Any], kind: SampleKind, *, tokens_per_batch: int) -> Iterator[Any]:
    """Micro batches of samples as they come, each of as many as fit; one that is larger stands alone."""
    group: list[Any] = []
    room = tokens_per_batch
    for sample in samples:
        num_rows = kind.num_rows(sample)
        if num_rows > room and group:
            yield kind.pack(group)
            group, room = [], tokens_per_batch
        group.append(sample)
        room -= num_rows
    if group:
        yield kind.pack(group)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, a bijection of 64 bits (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SampleStream:
    """A TrainSource of sample sets of one kind. `weights` are their shares of the rows; None: by their sizes, so that
    all are passed over together.

    `fingerprint` stands for the samples: a position means nothing elsewhere. Raises UsageError where a set is empty or
    a sample has more rows than a micro batch.
    """

    def __init__(
        self,
        sets: Sequence[SampleSet],
        *,
        tokens_per_batch: int,
        seed: int,
        fingerprint: str,
        weights: Sequence[float] | None = None,
    ) -> None:
        assert sets and all(len(each) for each in sets)
        self._sets, self._tokens_per_batch, self._seed = sets, tokens_per_batch, seed
        self._weights = [float(each.num_rows) for each in sets] if weights is None else list(weights)
        if len(self._weights) != len(sets) or min(self._weights) <= 0:
            raise UsageError(f"{len(sets)} sources need as many weights above zero, not {self._weights}")
        self._fingerprint = f"{fingerprint}/{tokens_per_batch}/{seed}/{self._weights}"
        self._epochs, self._places, self._rows = ([0] * len(sets) for _ in range(3))
        self._orders: list[np.ndarray | None] = [None] * len(sets)

    @property
    def num_tokens(self) -> int:
        return sum(each.num_rows for each in self._sets)

    @property
    def epoch(self) -> int:
        return sum(self._rows) // self.num_tokens

    @property
    def position(self) -> dict[str, Any]:
        return {
            "epochs": list(self._epochs),
            "places": list(self._places),
            "rows": list(self._rows),
            "fingerprint": self._fingerprint,
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        if position["fingerprint"] != self._fingerprint:
            raise CorruptCheckpoint(
                "the snapshot was taken with other data, weights, batch size, tokenizer or seed; it cannot go on here"
            )
        self._epochs, self._places, self._rows = (list(position[key]) for key in ("epochs", "places", "rows"))
        self._orders = [None] * len(self._sets)

    def next_batch(self) -> Any:
        return self._sets[0].kind.pack(self._next_samples())

    def count_batches(self, epochs: float) -> int:
        """How many micro batches it takes from here to have passed over the rows `epochs` times. Moves on."""
        for number, _ in enumerate(iter(self._next_samples, None), start=1):
            if sum(self._rows) >= epochs * self.num_tokens:
                return number
        raise AssertionError("the stream is endless")

    def _next_samples(self) -> list[Any]:
        chosen: list[Any] = []
        room = self._tokens_per_batch
        for which, sample in iter(self._peek, None):
            num_rows = self._sets[which].kind.num_rows(sample)
            if num_rows > room:
                break
            chosen.append(sample)
            room -= num_rows
            self._advance(which, num_rows)
        if not chosen:
            raise UsageError(f"a sample of {num_rows} tokens is longer than a batch of {self._tokens_per_batch}")
        return chosen

    def _peek(self) -> tuple[int, Any]:
        """The set that is furthest behind its weight, and its next sample."""
        which = min(range(len(self._sets)), key=lambda index: self._rows[index] / self._weights[index])
        order = self._orders[which]
        if order is None:
            order = self._sets[which].order(f"{self._seed}/{which}/{self._epochs[which]}")
            self._orders[which] = order
        return which, self._sets[which][int(order[self._places[which]])]

    def _advance(self, which: int, num_rows: int) -> None:
        self._rows[which] += num_rows
        self._places[which] += 1
        if self._places[which] == len(self._sets[which]):
            self._epochs[which], self._places[which] = self._epochs[which] + 1, 0
            self._orders[which] = None


def coded(lesson: Lesson) -> Document:
    """A lesson as a document, without what stands behind its last learnt token."""
    ids, is_learned = np.asarray(lesson.token_ids, dtype=np.int32), np.asarray(lesson.is_learned)
    is_learned[:1] = False  # nothing stands before it
    end = int(np.flatnonzero(is_learned)[-1]) + 1
    return np.where(is_learned, ids, ~ids)[:end]


def pieces(token_ids: Sequence[int], *, num_rows: int) -> Iterator[Document]:
    """A text as samples of at most `num_rows` rows. The last token of a piece is the first of the next."""
    ids = np.asarray(token_ids, dtype=np.int32)
    for start in range(0, max(1, len(ids) - 1), num_rows):
        piece = ids[start : start + num_rows + 1].copy()
        piece[:1] = ~piece[:1]  # nothing stands before it
        yield piece
