"""Reading what safetensors files say about themselves, before any tensor is touched. No torch.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). The format's own library lets some faults pass that matter here (a key
that appears twice, names that look like paths), so every rule is checked in this file.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from qnext.errors import CorruptCheckpoint, ModelNotFound

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 512
ITEM_SIZES = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1,
}  # fmt: skip


class TensorInfo(NamedTuple):
    """Where one tensor lies: bytes [start, end) of `file`, counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class CheckpointIndex(NamedTuple):
    """All tensors of a model folder in the order of the files, and the files."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]


def read_index(folder: str | Path) -> CheckpointIndex:
    """Headers of the one file, or of all shards, of a model folder, checked against each other and the index.

    Raises ModelNotFound where there is no safetensors model, CorruptCheckpoint naming file and tensor for the rest.
    """
    root = Path(folder)
    single, index = root / SINGLE_FILE, root / INDEX_FILE
    if not root.is_dir():
        raise ModelNotFound(f"{root}: no such folder")
    if single.exists() and index.exists():
        raise CorruptCheckpoint(f"{root}: holds both {SINGLE_FILE} and {INDEX_FILE}; which one is meant is unclear")
    if single.exists():
        return CheckpointIndex(root, (single,), read_header(_regular_file(root, SINGLE_FILE)))
    if not index.exists():
        only_pickle = any(root.glob("pytorch_model*.bin"))
        hint = "; pytorch_model*.bin is pickle and is never read" if only_pickle else ""
        raise ModelNotFound(f"{root}: neither {SINGLE_FILE} nor {INDEX_FILE} there{hint}")
    weight_map = _read_weight_map(index)
    files = {name: _regular_file(root, name, index) for name in dict.fromkeys(weight_map.values())}
    tensors: dict[str, TensorInfo] = {}
    for shard, path in files.items():
        for name, info in read_header(path).items():
            if weight_map.get(name) != shard:
                where = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                raise CorruptCheckpoint(f"{path}: tensor {name} is here, but {INDEX_FILE} {where}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CorruptCheckpoint(f"{files[shard]}: tensor {name} is missing, although {INDEX_FILE} places it here")
    return CheckpointIndex(root, tuple(files.values()), tensors)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name, in the order of their bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CorruptCheckpoint(f"{path}: truncated inside its header ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise CorruptCheckpoint(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        text = file.read(length)
    entries = load_json(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpoint(f"{path}: __metadata__ must map strings to strings")
    infos = [_read_entry(name, entry, path, 8 + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_layout(infos, path, 8 + length, size)
    return {info.name: info for info in infos}


def load_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key appears twice; CorruptCheckpoint naming the file otherwise."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CorruptCheckpoint(f"{path}: key {twice!r} appears twice")
        return values

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        values = json.loads(decoded, object_pairs_hook=refuse_duplicates)
    except CorruptCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not readable as JSON ({str(error)[:100]})") from None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path}: must hold a JSON object")
    return values


def _read_entry(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    check_name(name, path)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpoint(f"{path}: tensor {name}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise CorruptCheckpoint(f"{path}: tensor {name}: dtype {dtype!r} is not supported")
    if not _are_sizes(shape) or len(shape) > 8:
        raise CorruptCheckpoint(f"{path}: tensor {name}: bad shape {str(shape)[:80]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptCheckpoint(f"{path}: tensor {name}: bad data_offsets {str(offsets)[:80]}")
    needed = prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise CorruptCheckpoint(
            f"{path}: tensor {name}: {dtype} {shape} needs {needed} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def check_name(name: str, path: Path) -> None:
    """Refuse a tensor name that could act as a path or spoil a terminal."""
    if not name or len(name) > MAX_NAME_LENGTH or ".." in name or "/" in name or "\\" in name or not name.isprintable():
        raise CorruptCheckpoint(f"{path}: {name[:80]!r} is not a tensor name")


def _check_layout(infos: Iterable[TensorInfo], path: Path, data_start: int, size: int) -> None:
    position = data_start
    for info in infos:
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise CorruptCheckpoint(f"{path}: tensor {info.name} {fault}")
        if info.end > size:
            raise CorruptCheckpoint(f"{path}: truncated inside tensor {info.name} ({size} of {info.end} bytes)")
        position = info.end
    if position != size:
        raise CorruptCheckpoint(f"{path}: {size - position} bytes after the last tensor")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _read_weight_map(index: Path) -> Mapping[str, str]:
    weight_map = load_json(_regular_file(index.parent, index.name).read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(f"{index}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        check_name(name, index)
        is_plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\:")
        if not is_plain or shard.startswith(".") or not shard.endswith(".safetensors"):
            raise CorruptCheckpoint(
                f"{index}: tensor {name}: {str(shard)[:80]!r} is not the name of a file in the folder"
            )
    return weight_map


def _regular_file(folder: Path, name: str, index: Path | None = None) -> Path:
    """`folder / name`, which must be a file there or a link of the Hugging Face cache into its blobs."""
    path = folder / name
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        named_by = f", named by {index.name}" if index is not None else ""
        raise CorruptCheckpoint(f"{path}: file is missing{named_by}") from None
    real_folder, target = folder.resolve(), path.resolve()
    if not is_regular or target.parent not in (real_folder, real_folder.parent.parent / "blobs"):
        raise CorruptCheckpoint(f"{path}: is no regular file of this folder")
    return path
