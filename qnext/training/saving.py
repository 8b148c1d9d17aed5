"""Snapshots of runs in several processes: each writes its parts, and reads its parts of any snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint.snapshot import Snapshot, check_weights, file_entry, part_file, save_snapshot
from qnext.training.ranks import ALONE, TrainingRanks

Collections = dict[str, dict[str, Tensor]]
_CUT = ("model", "optimizer", "best")  # collections of `<parameter>` or `<parameter>/<key>`


def save_of_ranks(
    folder: Path, snapshot: Snapshot, *, keep: int, part_of: Mapping[str, Tensor], ranks: TrainingRanks
) -> None:
    """Write a snapshot whose tensors are parts: whole or not at all, by all processes together.

    The first makes the folder and names it when all have written. Raises OSError in all where one fails.
    """
    if ranks is ALONE:
        save_snapshot(folder, snapshot, keep=keep)
        return
    parts, rest = _divided(snapshot.tensors, part_of, ranks)
    was_told, failure = False, None

    def write(partial: Path) -> dict[str, dict[str, int]]:
        nonlocal was_told
        was_told = True
        return _write_parts(ranks.told(str(partial)), parts, ranks)

    try:
        if ranks.is_first:
            save_snapshot(folder, Snapshot(snapshot.step, rest, snapshot.state), keep=keep, others=write)
        elif place := ranks.told(""):
            _write_parts(place, parts, ranks)
    except OSError as error:
        failure = error
    if ranks.is_first and not was_told:
        ranks.told("")
    if ranks.gather_parts(torch.tensor([failure is not None])).any():
        raise failure or OSError("another process could not write its part")


def _divided(
    tensors: Mapping[str, Mapping[str, Tensor]], part_of: Mapping[str, Tensor], ranks: TrainingRanks
) -> tuple[dict[str, Tensor], Collections]:
    """What is cut, as `<collection>:<name>`; and what all processes have alike."""
    parts: dict[str, Tensor] = {}
    rest: Collections = {}
    for kind, collection in tensors.items():
        for name, each in collection.items():
            if kind in _CUT and each.dim():
                parts[f"{kind}:{name}"] = ranks.placed(each, part_of[name.split("/")[0]])
            else:
                rest.setdefault(kind, {})[name] = each
    return parts, rest


def _write_parts(place: str, parts: Mapping[str, Tensor], ranks: TrainingRanks) -> dict[str, dict[str, int]]:
    """The files of all processes and what is in them."""
    from qnext.checkpoint.parts import write_parts

    file, failure = Path(), None
    entry = {"bytes": 0, "crc32": 0}
    try:
        file = write_parts(Path(place), parts, group=ranks.group)
        entry = file_entry(file)
    except OSError as error:
        failure = error
    told_R3 = ranks.gather_parts(torch.tensor([entry["bytes"], entry["crc32"], int(failure is not None)]))
    if told_R3[:, 2].any():
        raise failure or OSError("another process could not write its part")
    return {part_file(rank): {"bytes": size, "crc32": crc} for rank, (size, crc, _) in enumerate(told_R3.tolist())}


def parts_of_snapshot(
    snapshot: Snapshot, part_of: Mapping[str, Tensor], ranks: TrainingRanks, *, source: str
) -> Collections:
    """The parts of this process of model, optimiser and best model. Raises KeyError for a parameter that is not there,
    and CorruptCheckpoint where a shape is another."""
    if not snapshot.parts:
        shapes = {name: ranks.shape(part) for name, part in part_of.items()}
        check_weights(shapes, snapshot.tensors["model"], source=source)
    found = {kind: _cut(snapshot.tensors.get(kind, {}), part_of, ranks) for kind in _CUT}
    if snapshot.parts:
        from qnext.checkpoint.parts import read_parts

        def wanted(full_name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            kind, _, name = full_name.partition(":")
            part = part_of[name.split("/")[0]]
            check_weights({name: ranks.shape(part)}, {name: torch.empty(shape, device="meta")}, source=source)
            mine = found[kind][name] = torch.empty_like(part, dtype=dtype, requires_grad=False)
            return ranks.placed(mine, part)

        read_parts(snapshot.parts, wanted)
    return found


def _cut(tensors: Mapping[str, Tensor], part_of: Mapping[str, Tensor], ranks: TrainingRanks) -> dict[str, Tensor]:
    """Of whole tensors, `<parameter>` or `<parameter>/<key>`, what is here; a number of steps has no dims and is all
    here."""
    return {
        name: ranks.cut(each, part_of[name.split("/")[0]]) if each.dim() else each for name, each in tensors.items()
    }
