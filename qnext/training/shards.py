"""Tokenised samples on disk: shards that check themselves and are mapped into memory, and the manifest that lists them.

A shard is a file of the arrays `ends` (int64, where each sample ends) and `tokens` (int32, learnt tokens as their id,
the others as ~id). Its name is the hash of what it was made from. So a build that was killed finds what it had made.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qnext.errors import CorruptCheckpoint
from qnext.files import write_file
from qnext.training.arrays import ArrayFile, write_arrays
from qnext.training.data import Document

_FORMAT, MANIFEST = "qnext-data-1", "manifest.json"


@dataclass(frozen=True)
class ShardFacts:
    """What a shard holds, and which samples are not in it, as lists of their places by the reason."""

    num_samples: int
    num_tokens: int
    num_learned: int
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)


class DataShard:
    """A shard on disk as a sequence of documents. Raises CorruptCheckpoint naming the file where it is damaged."""

    def __init__(self, path: Path) -> None:
        file = ArrayFile(path)
        self.path = path
        self.facts = ShardFacts(**file.facts)
        self.ends, self._tokens = file.arrays["ends"], file.arrays["tokens"]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Document:
        return self._tokens[self.ends[index - 1] if index else 0 : self.ends[index]]

    @property
    def checksum(self) -> int:
        return zlib.crc32(self._tokens.data, zlib.crc32(self.ends.data))


def write_shard(path: Path, documents: Sequence[Document], left_out: Mapping[str, Sequence[str]]) -> ShardFacts:
    """Publish a shard at `path`. Raises OSError and DiskFull."""
    tokens = np.concatenate([*documents, np.zeros(0, np.int32)]).astype(np.int32)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    facts = ShardFacts(len(documents), len(tokens), int((tokens >= 0).sum()), left_out)
    write_arrays(path, asdict(facts), {"ends": ends, "tokens": tokens})
    return facts


@dataclass(frozen=True)
class DataSource:
    """One file or folder of data, tokenised."""

    path: str
    shards: tuple[str, ...]
    num_samples: int = 0
    num_tokens: int = 0
    num_learned: int = 0
    num_duplicates: int = 0
    num_left_out: Mapping[str, int] = field(default_factory=dict)  # by reason
    first_left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # their first places


@dataclass(frozen=True)
class Manifest:
    """What a data folder was made from. `made_with` holds fingerprints of tokenizer and template, and the choices that
    decide what is learnt."""

    made_with: Mapping[str, Any]
    sources: tuple[DataSource, ...]

    def write(self, folder: Path) -> None:
        write_file(folder / MANIFEST, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where there is none. Raises CorruptCheckpoint for one that is malformed."""
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("format") != _FORMAT:
                raise ValueError(f"not a {_FORMAT} file")
            sources = [DataSource(**{**each, "shards": tuple(each["shards"])}) for each in value["sources"]]
            if any(Path(name).name != name for source in sources for name in source.shards):
                raise ValueError("a shard outside the folder")
            return cls(value["made_with"], tuple(sources))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(
                f"{path}: malformed ({error}); remove it, and the next start makes it again"
            ) from None

    def open(self, folder: Path) -> list[list[DataShard]]:
        """The shards of every source. Raises CorruptCheckpoint for one that is missing or damaged."""
        return [[DataShard(folder / name) for name in source.shards] for source in self.sources]
