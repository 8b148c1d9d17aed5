"""What has been done of a folder that is quantised shard by shard: a later run goes on from it.

In the unfinished folder lie `plan.json`, which says what is made of which tensors, and `done-<number>.json` for each
shard of the source whose weights are on the disk, with what rounding them cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from qnext.checkpoint.header import load_json
from qnext.checkpoint.tensor_info import TensorInfo
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.files import write_file
from qnext.quant.report import TensorError

_FORMAT = "qnext-quantize-1"


class Task(NamedTuple):
    """What was asked for. Another run goes on only with the same."""

    source: str
    scheme: str
    head: str | None
    max_shard_bytes: int


class ShardHeaders(NamedTuple):
    """The files of the source in their order, and their tensors under the names that they have there."""

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    def of(self, file: Path) -> dict[str, TensorInfo]:
        return {name: info for name, info in self.tensors.items() if info.file == file}


class Ledger:
    """The plan of an unfinished folder, and which shards of the source are done."""

    def __init__(self, place: Path, headers: ShardHeaders) -> None:
        self._place = place
        self.headers = headers
        self.errors: dict[int, list[TensorError]] = {}  # by the number of the shard, of those that are done

    def is_done(self, number: int) -> bool:
        return number in self.errors

    def record(self, number: int, errors: Iterable[TensorError]) -> None:
        """All weights of a shard are on the disk."""
        self.errors[number] = list(errors)
        document = {"format": _FORMAT, "errors": [asdict(error) for error in self.errors[number]]}
        write_file(self._place / f"done-{number:05d}.json", json.dumps(document))


def begin_ledger(place: Path, task: Task, headers: ShardHeaders) -> Ledger:
    numbers = {file: number for number, file in enumerate(headers.files)}
    document = {
        "format": _FORMAT,
        "task": task._asdict(),
        "files": [file.name for file in headers.files],
        "tensors": [
            [info.name, info.dtype, list(info.shape), numbers[info.file], info.start, info.end]
            for info in headers.tensors.values()
        ],
    }
    write_file(place / "plan.json", json.dumps(document))
    return Ledger(place, headers)


def read_ledger(place: Path, task: Task, root: Path) -> Ledger | None:
    """What earlier runs have done with the shards in the folder `root`; None where none has begun.

    Raises UsageError where they were asked for something else, CorruptCheckpoint for files that are not theirs.
    """
    path = place / "plan.json"
    if not path.exists():
        return None
    document = _read(path)
    try:
        begun = Task(**document["task"])
        files = tuple(root / Path(name).name for name in document["files"])
        tensors = {
            row[0]: TensorInfo(row[0], row[1], tuple(row[2]), files[row[3]], row[4], row[5])
            for row in document["tensors"]
        }
    except (KeyError, TypeError, IndexError) as error:
        raise CorruptCheckpoint(f"{path}: is no plan of this version ({error!r})") from None
    for name, asked in task._asdict().items():
        if asked != getattr(begun, name):
            raise UsageError(
                f"{place}: an earlier run was begun with the {name} {getattr(begun, name)}, not {asked}; "
                "give the same, or delete that folder"
            )
    ledger = Ledger(place, ShardHeaders(files, tensors))
    for number in range(len(files)):
        done = place / f"done-{number:05d}.json"
        if done.exists():
            ledger.errors[number] = _errors(_read(done), done)
    return ledger


def _read(path: Path) -> Mapping[str, Any]:
    document = load_json(path.read_bytes(), path)
    if document.get("format") != _FORMAT:
        raise CorruptCheckpoint(f"{path}: is not of this version of qnext quantize")
    return document


def _errors(document: Mapping[str, Any], path: Path) -> list[TensorError]:
    try:
        return [TensorError(**row) for row in document["errors"]]
    except (KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path}: is no record of a shard ({error!r})") from None
