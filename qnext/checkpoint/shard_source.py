"""Models whose shards come and go while they are read: a folder that gives its shards away, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from qnext.checkpoint.header import read_headers
from qnext.checkpoint.ledger import ShardHeaders
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.files import remove_file


class ShardSource(Protocol):
    """Where shards are had from, one at a time. `name` is what a later run has to ask for again.

    `is_elsewhere`: shards take room only from `fetch` to `drop`.
    """

    name: str
    is_elsewhere: bool

    def begin(self, place: Path) -> Path:
        """The folder of configuration, tokenizer and shards. `place` is there for what is downloaded."""
        ...

    def headers(self) -> ShardHeaders:
        """Of all shards, before any is fetched."""
        ...

    def fetch(self, file: Path) -> None:
        """Have a shard there, if it is not."""
        ...

    def refuse(self, file: Path) -> None:
        """A shard is not what its header said: it has to be had anew."""
        ...

    def drop(self, file: Path) -> None:
        """Nobody needs a shard any more. One that is not there is no error."""
        ...


class LocalShards:
    """The shards of a folder, deleted as they are done."""

    is_elsewhere = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.name = str(self._folder)

    def begin(self, place: Path) -> Path:
        return self._folder

    def headers(self) -> ShardHeaders:
        """Raises UsageError for links: what they lead to would stay."""
        headers = ShardHeaders(*read_headers(self._folder))
        for file in headers.files:
            if file.is_symlink():
                raise UsageError(f"{file}: is a link, and deleting it would free nothing; --from-hub needs no copy")
        return headers

    def fetch(self, file: Path) -> None:
        if not file.is_file():
            raise CorruptCheckpoint(f"{file}: file is missing, and it is not done")

    def refuse(self, file: Path) -> None:
        pass

    def drop(self, file: Path) -> None:
        remove_file(file)
