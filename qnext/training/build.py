"""Files of samples -> tokenised shards and their manifest: deduplicated, in units that a killed build finds again."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from qnext.errors import CorruptCheckpoint, UsageError, warn
from qnext.files import remove_file
from qnext.text.lessons import Teacher
from qnext.text.pairs import pair_of
from qnext.text.sample_files import data_files, read_values
from qnext.text.samples import Sample, sample_of
from qnext.training.arrays import is_damaged
from qnext.training.data import Document
from qnext.training.samples import coded, pieces
from qnext.training.shards import DataShard, DataSource, Manifest, ShardFacts, write_shard

UNTAUGHT, TOO_LONG = "nothing to learn", "too long"
_UNIT_SAMPLES, _UNIT_CHARACTERS = 1024, 1 << 20
_NAMED = 5  # places of samples that are left out, by reason


class Readable(Protocol):
    """A sample as it was read, not yet tokenised."""

    @property
    def num_characters(self) -> int: ...

    def digest(self) -> bytes: ...


class Unit(NamedTuple):
    """What becomes one shard: samples and their places."""

    key: str
    samples: list[tuple[str, Any]]


@dataclass(frozen=True)
class Tokenizing:
    """How values become samples, and samples documents. `made_with` is what tells one way from another, for the
    manifest.

    A text ends with `end_of_text` and is cut into samples of `sequence_length` rows. A conversation that is longer is
    left out. `form` is that of all samples; None: of each by its keys.
    """

    teacher: Teacher
    end_of_text: int
    sequence_length: int
    made_with: Mapping[str, Any] = field(default_factory=dict)
    form: str | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {**self.made_with, "sequence_length": self.sequence_length}

    def read(self, value: Any) -> Readable:
        """Raises UsageError for what is no sample."""
        return sample_of(value, form=self.form)

    def documents(self, samples: Iterable[tuple[str, Any]]) -> tuple[list[Document], dict[str, list[str]]]:
        """The documents, and the places of the samples that are left out, by reason. Raises UsageError naming the place
        of a sample that the chat format refuses."""
        found: list[Document] = []
        left_out: dict[str, list[str]] = {}
        for place, sample in samples:
            try:
                documents = self.tokenized(sample)
            except UsageError as error:
                raise UsageError(f"{place}: {error}") from None
            if not documents:
                left_out.setdefault(UNTAUGHT, []).append(place)
            short = self.short_ones(documents)
            if len(short) < len(documents):
                left_out.setdefault(TOO_LONG, []).append(place)
            found += short
        return found, left_out

    def tokenized(self, sample: Any) -> list[Document]:
        """The documents of a sample; none where there is nothing to learn."""
        return self._text(sample.text) if sample.text is not None else self.conversation(sample)

    def short_ones(self, documents: Sequence[Document]) -> list[Document]:
        """Those documents of a sample that are not too long."""
        return [document for document in documents if len(document) - 1 <= self.sequence_length]

    def conversation(self, sample: Sample) -> list[Document]:
        lessons = self.teacher.lessons(sample.messages, tools=sample.tools, is_taught=sample.is_taught)
        return [coded(lesson) for lesson in lessons if any(lesson.is_learned[1:])]

    def _text(self, text: str) -> list[Document]:
        ids = [*self.teacher.tokenizer.encode(text), self.end_of_text]
        return list(pieces(ids, num_rows=self.sequence_length)) if len(ids) > 1 else []


@dataclass(frozen=True)
class PairTokenizing(Tokenizing):
    """How pairs of answers become two documents each, the chosen one first. A pair stays whole or is left out."""

    def read(self, value: Any) -> Readable:
        return pair_of(value)

    def tokenized(self, sample: Any) -> list[Document]:
        """Raises UsageError where the chat format divides a conversation, so that an answer is no single document."""
        answers = [self.conversation(each) for each in sample]
        if any(len(documents) > 1 for documents in answers):
            raise UsageError("the chat template writes earlier turns in another way; only the last turns may differ")
        documents = [document for answer in answers for document in answer]
        return documents if len(documents) == 2 and not np.array_equal(documents[0], documents[1]) else []

    def short_ones(self, documents: Sequence[Document]) -> list[Document]:
        short = super().short_ones(documents)
        return short if len(short) == len(documents) else []


def build(
    paths: Sequence[Path],
    folder: Path,
    tokenizing: Tokenizing,
    *,
    report: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Tokenise the files and folders into `folder`, and publish its manifest when all is there.

    A sample whose content came before, in any of them, is left out. Shards that an earlier build made of the same
    samples in the same way are taken as they are, unless they are damaged; others are removed. `report` gets the bytes
    read and the bytes in all. Raises UsageError naming
    file and line of what is no sample, and where a source has nothing to learn.
    """
    made_with = tokenizing.fingerprint
    salt = hashlib.blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=16).digest()
    total = sum(file.stat().st_size for path in paths for file in data_files(path))
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    sources: list[DataSource] = []
    done = 0
    for path in paths:
        reading = _SampleReading(path, seen, salt, tokenizing)
        shards: dict[str, ShardFacts] = {}
        for name, facts, num_bytes_read in _shards(reading, folder, tokenizing):
            shards[name] = facts
            if report is not None:
                report(done + num_bytes_read, total)
        done += sum(file.stat().st_size for file in data_files(path))
        sources.append(_source(path, shards, reading.num_duplicates))
    manifest = Manifest(made_with, tuple(sources))
    manifest.write(folder)
    kept = {name for source in sources for name in source.shards}
    for file in folder.glob("*.shard"):
        if file.name not in kept:
            remove_file(file)
    return manifest


def _shards(reading: _SampleReading, folder: Path, tokenizing: Tokenizing) -> Iterator[tuple[str, ShardFacts, int]]:
    """Name, facts and the bytes that were read for each shard, in order. A thread for each core makes them: the
    tokenizer does its work without the interpreter's lock. As many units as there are threads wait in memory."""
    num_threads = torch.get_num_threads()
    waiting: deque[tuple[str, Future[ShardFacts], int]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for unit in reading.units():
                name = f"{unit.key}.shard"
                made = pool.submit(_made, folder / name, unit, tokenizing)
                waiting.append((name, made, reading.num_bytes_read))
                if len(waiting) > 2 * num_threads:
                    yield _awaited(waiting)
            while waiting:
                yield _awaited(waiting)
        finally:
            for _, made, _ in waiting:
                made.cancel()


def _awaited(waiting: deque[tuple[str, Future[ShardFacts], int]]) -> tuple[str, ShardFacts, int]:
    name, made, num_bytes_read = waiting.popleft()
    return name, made.result(), num_bytes_read


def built(paths: Sequence[Path], folder: Path, tokenizing: Tokenizing) -> Manifest | None:
    """The manifest of an earlier build of these paths, made in the same way, if all its shards are sound. Nothing is
    read but the folder."""
    try:
        manifest = Manifest.read(folder)
        if manifest is None or manifest.made_with != tokenizing.fingerprint:
            return None
        manifest.open(folder)
    except CorruptCheckpoint as error:
        warn(f"{error}; what is damaged is made again", error=CorruptCheckpoint)
        return None
    return manifest if [source.path for source in manifest.sources] == list(map(str, paths)) else None


def _made(path: Path, unit: Unit, tokenizing: Tokenizing) -> ShardFacts:
    if is_damaged(path):
        warn(f"{path}: damaged; it is made again", error=CorruptCheckpoint)
    elif path.is_file():
        return DataShard(path).facts
    return write_shard(path, *tokenizing.documents(unit.samples))


def _source(path: Path, shards: Mapping[str, ShardFacts], num_duplicates: int) -> DataSource:
    facts = shards.values()
    left_out: dict[str, list[str]] = {}
    for each in facts:
        for reason, places in each.left_out.items():
            left_out.setdefault(reason, []).extend(places)
    told = {reason: f"{len(places)} samples: {reason}, such as {places[0]}" for reason, places in left_out.items()}
    if not sum(each.num_learned for each in facts):
        raise UsageError(f"{path}: nothing to learn from in it" + "".join(f"; {line}" for line in told.values()))
    return DataSource(
        str(path),
        tuple(shards),
        sum(each.num_samples for each in facts),
        sum(each.num_tokens for each in facts),
        sum(each.num_learned for each in facts),
        num_duplicates,
        {reason: len(places) for reason, places in left_out.items()},
        {reason: places[:_NAMED] for reason, places in left_out.items()},
    )


class _SampleReading:
    """One pass over the samples of a path."""

    def __init__(self, path: Path, seen: set[bytes], salt: bytes, tokenizing: Tokenizing) -> None:
        self._path, self._seen, self._salt, self._tokenizing = path, seen, salt, tokenizing
        self.num_duplicates = self.num_bytes_read = 0

    def units(self) -> Iterator[Unit]:
        samples: list[tuple[str, Any]] = []
        key, size = hashlib.blake2b(self._salt, digest_size=16), 0
        for found in read_values(self._path):
            try:
                sample = self._tokenizing.read(found.value)
            except UsageError as error:
                raise UsageError(f"{found.place}: {error}") from None
            self.num_bytes_read = found.num_bytes_read
            digest = sample.digest()
            if digest in self._seen:
                self.num_duplicates += 1
                continue
            self._seen.add(digest)
            key.update(digest)
            samples.append((found.place, sample))
            size += sample.num_characters
            if len(samples) == _UNIT_SAMPLES or size >= _UNIT_CHARACTERS:
                yield Unit(key.hexdigest(), samples)
                samples, size = [], 0
                key = hashlib.blake2b(self._salt, digest_size=16)
        if samples:
            yield Unit(key.hexdigest(), samples)
