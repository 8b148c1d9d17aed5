"""The files that make up one model: a GGUF file alone, or all parts of a split one. No torch.

llama-gguf-split names parts NAME-00001-of-00003.gguf and writes split.no, split.count and split.tensors.count. The keys
of the model are in the first part (llama.cpp, src/llama-model-loader.cpp and tools/gguf-split).
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from qnext.checkpoint.gguf.container import GgufFile, GgufTensor, is_gguf, read_part
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, UsageError

_PART = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
# Cut by bytes, not by tensors: the first has GGUF's header and too few bytes, the others have none.
_BYTES = re.compile(r"(?P<whole>.+\.gguf)[.-](?:part\d+of\d+|split-[a-z]{1,2}|part-?\w{1,3}|\d{3})", re.IGNORECASE)
# Companions of a model in a repository, by the beginning of their names.
_COMPANIONS = ("mmproj", "imatrix", "mtp-")
_MAX_PARTS = 10_000
_SHOWN = 5


def find_gguf(name: str) -> Path | None:
    """The first GGUF file of a file, a folder or a pattern such as `DIR/*Q4_K_M*.gguf`, or None.

    Raises UsageError where several models match, NotSupported for pieces that were cut by bytes, and ModelNotFound for
    a name that ends in .gguf and does not exist.
    """
    path = Path(name).expanduser()
    if _BYTES.fullmatch(path.name) and not path.is_dir():
        whole = path.with_name(_BYTES.fullmatch(path.name)["whole"])  # type: ignore[index]
        raise NotSupported(f"{path}: a piece of a file that was cut by bytes; join them: cat {whole}?* > {whole}")
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or is_gguf(path) else None
    if path.is_dir():
        return _only(path.iterdir(), str(path))
    if any(character in name for character in "*?["):
        return _only(map(Path, glob.glob(str(path))), name)
    if path.suffix.lower() == ".gguf":
        parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*-of-*.gguf"))
        hint = f"; there is {parts[0]}" if parts else ""
        raise ModelNotFound(f"{path}: no such file{hint}")
    return None


def read_gguf(path: str | Path) -> GgufFile:
    """Keys and tensors of the model in a GGUF file. A part of a split file is read together with the other parts.

    Raises CorruptCheckpoint where parts are missing, contradict each other or hold a tensor twice; else see read_part.
    """
    given = read_part(path)
    count = _number(given, "split.count", 1)
    if count <= 1:
        return given
    paths = _paths(given, count)
    parts = [given if part == given.path else read_part(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for i, part in enumerate(parts):
        for key, expected in (("split.count", count), ("split.no", i)):
            value = _number(part, key, expected)
            if value != expected:
                raise CorruptCheckpoint(f"{part.path}: key {key}: {value}, where {expected} belongs")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CorruptCheckpoint(f"{part.path}: tensor {name} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    announced = _number(parts[0], "split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise CorruptCheckpoint(
            f"{parts[0].path}: key split.tensors.count: {announced}, the {count} parts hold {len(tensors)} tensors"
        )
    return GgufFile(parts[0].path, parts[0].keys, tensors)


def _paths(given: GgufFile, count: int) -> list[Path]:
    """All parts in order. Raises CorruptCheckpoint naming those that are missing."""
    match = _PART.fullmatch(given.path.name)
    if count > _MAX_PARTS:
        raise CorruptCheckpoint(f"{given.path}: key split.count: {count} parts, at most {_MAX_PARTS} are read")
    if match is None:
        raise CorruptCheckpoint(
            f"{given.path}: one of {count} parts, but its name does not end in -00001-of-{count:05d}.gguf, "
            "by which the others are found"
        )
    if int(match["count"]) != count:
        raise CorruptCheckpoint(f"{given.path}: key split.count: {count}, the name says {int(match['count'])}")
    paths = [given.path.with_name(f"{match['prefix']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CorruptCheckpoint(f"{given.path.parent}: {_listed(missing)} missing, {len(missing)} of {count} parts")
    return paths


def _number(file: GgufFile, key: str, default: int) -> int:
    value = file.keys.get(key, default)
    if type(value) is not int or value < 0:
        raise CorruptCheckpoint(f"{file.path}: key {key}: must be a whole number, at least 0, not {str(value)[:60]}")
    return value


def _only(paths: Iterable[Path], where: str) -> Path | None:
    """The one model among files; a part stands for all of its model."""
    models: dict[str, Path] = {}
    for path in sorted(paths):
        if path.suffix.lower() == ".gguf" and path.is_file() and not path.name.lower().startswith(_COMPANIONS):
            match = _PART.fullmatch(path.name)
            models.setdefault(match["prefix"] if match else path.stem, path)
    if len(models) > 1:
        names = _listed([path.name for path in models.values()])
        raise UsageError(f"{where}: {len(models)} GGUF models: {names}; name one")
    return next(iter(models.values()), None)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
