"""Snapshots of a training run: folders that appear whole or not at all, of safetensors and JSON only.

A snapshot is `step-<number>/` with one `<name>.safetensors` per tensor collection and `state.json`, which holds the
run's own state and, for every other file, its size and CRC-32. Where several processes wrote it,
`rank-<number>.safetensors` has the parts of each: see parts.py.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.checkpoint.files import write_tensors
from qnext.checkpoint.reading import read_tensors
from qnext.errors import CorruptCheckpoint, warn
from qnext.files import new_folder, remove_folder, remove_partials, write_inside

_FORMAT = "qnext-snapshot-1"
_PREFIX, _STATE, _PART = "step-", "state.json", "rank-"

FileEntries = dict[str, dict[str, int]]  # of state.json


@dataclass(frozen=True)
class Snapshot:
    """The content of a snapshot: named collections of tensors and a JSON object. `parts` are files of processes."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    parts: Sequence[Path] = ()


def save_snapshot(
    folder: Path, snapshot: Snapshot, *, keep: int, others: Callable[[Path], FileEntries] | None = None
) -> Path:
    """Write `snapshot` under `folder`, then delete all but the newest `keep`. Returns the path of the new snapshot.

    The data is on disk before the folder gets its name, and a deleted snapshot loses its name before its data. So a
    crash leaves only complete snapshots. Snapshots of later steps are not deleted: a run that went back will reach
    these steps again. Raises OSError and DiskFull where the snapshot cannot be written; the earlier ones still exist
    then. A snapshot that cannot be deleted is no error. `others` adds files to the folder that is being made.
    """
    assert keep >= 1
    remove_partials(folder)
    final = path_of(folder, snapshot.step)
    with new_folder(final) as partial:
        files = {} if others is None else others(partial)
        for name in files:
            if not (partial / name).is_file():
                raise FileNotFoundError(ENOENT, "a process wrote it into another folder", str(final / name))
        for name, tensors in snapshot.tensors.items():
            path = partial / f"{name}.safetensors"
            write_tensors(path, tensors)
            files[path.name] = file_entry(path)
        document = {"format": _FORMAT, "step": snapshot.step, "files": files, "state": dict(snapshot.state)}
        write_inside(partial / _STATE, json.dumps(document, indent=1) + "\n")
    older = [path for path in list_snapshots(folder) if _step_of(path) < snapshot.step]
    for old in older[: len(older) - (keep - 1)]:
        with suppress(OSError):
            remove_folder(old)
    return final


def file_entry(path: Path) -> dict[str, int]:
    """What state.json says of a file."""
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def part_file(rank: int) -> str:
    """The name of the file of a process."""
    return f"{_PART}{rank:05d}.safetensors"


def path_of(folder: Path, step: int) -> Path:
    """Of the snapshot of a step."""
    return folder / f"{_PREFIX}{step:08d}"


def list_snapshots(folder: Path) -> list[Path]:
    """The finished snapshots under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(_PREFIX) and path.name[5:].isdecimal()]
    return sorted(found, key=_step_of)


def newest_snapshot(folder: Path) -> tuple[Path, Snapshot] | None:
    """The newest complete snapshot under `folder`, with one warning for each newer one that is damaged.

    None where there is no snapshot. Where none is complete, raises CorruptCheckpoint naming what is damaged in the
    newest.
    """
    damaged: list[CorruptCheckpoint] = []
    for path in reversed(list_snapshots(folder)):
        try:
            snapshot = load_snapshot(path)
        except CorruptCheckpoint as error:
            damaged.append(error)
            continue
        for found in damaged:
            warn(f"{found}; the run goes on from {path.name}", error=CorruptCheckpoint)
        return path, snapshot
    if damaged:
        raise CorruptCheckpoint(f"{damaged[0]}; no other snapshot is whole")
    return None


def load_snapshot(path: Path) -> Snapshot:
    """Read and check one snapshot. Raises CorruptCheckpoint naming the file that is missing or damaged."""
    try:
        return _load(path)
    except OSError as error:
        raise CorruptCheckpoint(f"{error.filename or path}: {error.strerror}") from error


def _load(path: Path) -> Snapshot:
    document = _read_state(path / _STATE)
    tensors: dict[str, dict[str, Tensor]] = {}
    parts: list[Path] = []
    for name, expected in document["files"].items():
        file = path / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{file}: missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CorruptCheckpoint(f"{file}: {size} bytes, expected {expected['bytes']}")
        if _crc32(file) != expected["crc32"]:
            raise CorruptCheckpoint(f"{file}: content differs from what was written (CRC-32)")
        if name.startswith(_PART):
            parts.append(file)
        else:
            tensors[file.stem] = read_tensors(file)
    return Snapshot(document["step"], tensors, document["state"], parts)


def load_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `weights` into `parameters` in place. Raises what check_weights raises."""
    check_weights({name: each.shape for name, each in parameters.items()}, weights, source=source)
    with torch.no_grad():
        for name, target in parameters.items():
            target.copy_(weights[name])


def check_weights(shapes: Mapping[str, torch.Size], weights: Mapping[str, Tensor], *, source: str) -> None:
    """CorruptCheckpoint names what is missing, surplus or of a wrong shape."""
    for name in shapes.keys() ^ weights.keys():
        where = "is missing from" if name in shapes else "is unknown to the model but in"
        raise CorruptCheckpoint(f"tensor {name} {where} {source}")
    for name, shape in shapes.items():
        if shape != weights[name].shape:
            raise CorruptCheckpoint(
                f"{source}: tensor {name} has shape {list(weights[name].shape)}, the model {list(shape)}"
            )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path}: missing") from None
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise CorruptCheckpoint(f"{path}: not a {_FORMAT} file")
    files = document.get("files")
    is_sound = (
        isinstance(document.get("step"), int)
        and isinstance(document.get("state"), dict)
        and isinstance(files, dict)
        and all(
            Path(name).name == name and isinstance(entry, dict) and {"bytes", "crc32"} <= entry.keys()
            for name, entry in files.items()
        )
    )
    if not is_sound:
        raise CorruptCheckpoint(f"{path}: step, files or state is missing or malformed")
    return document


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))
