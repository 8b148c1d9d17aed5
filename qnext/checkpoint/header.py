"""Reads what safetensors files say about themselves, before any tensor is read. No torch.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). The format's own library accepts some faults that matter here (a key that
appears twice, names that look like paths), so this file checks every rule.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from qnext.checkpoint.aliases import canonical
from qnext.checkpoint.foreign import without_model
from qnext.checkpoint.tensor_info import TensorInfo as TensorInfo
from qnext.collecting import without_collecting
from qnext.config.bounded import read_bounded, repeated_key
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, warn

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_LENGTH = 512
ITEM_SIZES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "BOOL": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
}
# The format's other dtypes: sound files, which no weight of a model that is read here has.
OTHER_DTYPES = (
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "C64",
    "C128",
)
_SHARD = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})\.safetensors")
_USUAL_NAME = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
_INTEGER = {int}
_LFS_POINTER = b"version https://git-lfs"


class FileState(NamedTuple):
    """The properties of a file that change when it is written to, or when another file takes its name."""

    device: int
    inode: int
    num_bytes: int
    written_ns: int

    @classmethod
    def of(cls, result: os.stat_result) -> FileState:
        return cls(result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns)


class CheckpointIndex(NamedTuple):
    """All tensors of a model folder in the order of the files, and the state of the files when their headers were
    read."""

    folder: Path
    files: dict[Path, FileState]
    tensors: dict[str, TensorInfo]


@without_collecting
def read_index(folder: str | Path) -> CheckpointIndex:
    """Headers of the one file, or of all shards, of a model folder, compared with each other and with the index.

    Raises ModelNotFound where there is no safetensors model, CorruptCheckpoint naming file and tensor for the rest.
    """
    root = Path(folder)
    files, tensors = read_headers(root)
    states = {path: FileState.of(path.stat()) for path in files}
    return CheckpointIndex(root, states, canonical(tensors))


def read_headers(root: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The files of a model folder, and their tensors under the names that they have there; see read_index."""
    if not root.is_dir():
        raise ModelNotFound(f"{root}: no such folder")
    single, index = root / SINGLE_FILE, root / INDEX_FILE
    uses_index = _is_there(index)
    if uses_index and _is_there(single) and not _needs_index(index):
        uses_index = False
    if uses_index:
        return _read_indexed(root, index)
    if _is_there(single):
        return (single,), read_header(_regular_file(root, SINGLE_FILE))
    return _read_without_index(root)


def index_of(source: str | Path | CheckpointIndex) -> CheckpointIndex:
    """The index of a folder whose headers may have been read already, because reading those of a large model takes
    seconds."""
    return source if isinstance(source, CheckpointIndex) else read_index(source)


def _is_there(path: Path) -> bool:
    """Whether a file of this name is there, be it a link to nothing."""
    return path.is_file() or path.is_symlink()


def _needs_index(index: Path) -> bool:
    """Beside model.safetensors: an index may name that file alone, or shards that were merged into it and are gone."""
    shards = set(read_weight_map(index).values())
    if shards != {SINGLE_FILE} and any(_is_there(index.parent / shard) for shard in shards):
        raise CorruptCheckpoint(f"{index.parent}: holds both {SINGLE_FILE} and {INDEX_FILE}; which is meant is unclear")
    return shards == {SINGLE_FILE}


def _read_indexed(root: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    weight_map = read_weight_map(index)
    shards = list(dict.fromkeys(weight_map.values()))
    absent = [name for name in shards if not _is_there(root / name)]
    if absent:
        raise CorruptCheckpoint(_missing_shards(root, absent, len(shards), f"named by {index.name}"))
    files = tuple(_regular_file(root, name) for name in shards)
    return files, place_tensors(root, weight_map, read_header)


def place_tensors(
    root: Path, weight_map: Mapping[str, str], read: Callable[[Path], dict[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of the files that an index names, of which `read` gives those of one, checked against the index."""
    files = {shard: root / shard for shard in dict.fromkeys(weight_map.values())}
    tensors: dict[str, TensorInfo] = {}
    for shard, path in files.items():
        for name, info in read(path).items():
            if weight_map.get(name) != shard:
                where = f"places it in {weight_map[name]}" if name in weight_map else "does not name it"
                raise CorruptCheckpoint(f"{path}: tensor {name} is here, but {INDEX_FILE} {where}")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CorruptCheckpoint(f"{files[shard]}: tensor {name} is missing, although {INDEX_FILE} places it here")
    return tensors


def _missing_shards(root: Path, absent: list[str], count: int, known_by: str) -> str:
    many = f"; {len(absent)} of {count} files are missing" if len(absent) > 1 else ""
    partial = any(root.rglob("*.incomplete"))
    return f"{root / absent[0]}: file is missing, {known_by}{many}" + ("; its download is not complete" * partial)


def _read_without_index(root: Path) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """Shards whose names say that all are there need no index, and one file alone may have any name."""
    named = sorted(path.name for path in root.glob("*.safetensors") if not path.name.startswith((".", "adapter_")))
    shards = {name: match for name in named if (match := _SHARD.fullmatch(name))}
    kinds = {(match[1], match[3], len(match[2])) for match in shards.values()}
    if len(kinds) == 1 and len(shards) == len(named):
        stem, last, digits = kinds.pop()
        if int(last) > 100_000 or int(last) < len(shards):
            raise CorruptCheckpoint(f"{root / named[0]}: a shard beyond the last, {last}")
        wanted = [f"{stem}-{i:0{digits}d}-of-{last}.safetensors" for i in range(1, int(last) + 1)]
        absent = [name for name in wanted if name not in shards]
        if absent:
            raise CorruptCheckpoint(_missing_shards(root, absent, len(wanted), "and there is no index"))
        named = wanted
    elif len(named) != 1 or named[0].startswith("consolidated"):
        raise without_model(root)
    files = tuple(_regular_file(root, name) for name in named)
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise CorruptCheckpoint(f"{path}: tensor {name} is here and in {tensors[name].file.name}")
            tensors[name] = info
    warn(f"{root}: no {INDEX_FILE}; {named[0]}{f' to {named[-1]}' if len(named) > 1 else ''} taken as the model")
    return files, tensors


def read_header(path: Path, *, any_name: bool = False) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name, in the order of their bytes. `any_name`: for files that qnext itself
    wrote."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix == _LFS_POINTER[:8] and prefix + file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
            raise CorruptCheckpoint(
                f"{path}: is a pointer of git-lfs, not the tensors; `git lfs pull` in its folder gets them"
            )
        text = file.read(header_length(prefix, path, size=size))
    return parse_header(text, path, size=size, any_name=any_name)


def header_length(prefix: bytes, path: Path, *, size: int) -> int:
    """Bytes of the header behind the first eight of a file of `size` bytes."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise CorruptCheckpoint(f"{path}: truncated inside its header ({size} bytes)")
    if length > MAX_HEADER_BYTES:
        raise CorruptCheckpoint(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return length


def parse_header(text: bytes, path: Path, *, size: int, any_name: bool = False) -> dict[str, TensorInfo]:
    """The same of a header that was read."""
    length = len(text)
    entries = load_json(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpoint(f"{path}: __metadata__ must map strings to strings")
    if not any_name:
        for name in entries:
            check_name(name, path)
    infos = [_read_entry(name, entry, path, 8 + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_layout(infos, path, 8 + length, size)
    return {info.name: info for info in infos}


def load_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """A JSON object in which no key appears twice. Otherwise CorruptCheckpoint names the file."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise CorruptCheckpoint(f"{path}: key {repeated_key(pairs)!r} appears twice")
        return values

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        values = json.loads(decoded, object_pairs_hook=refuse_duplicates)
    except CorruptCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not readable as JSON ({str(error)[:100]})") from None
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path}: must hold a JSON object")
    return values


def _read_entry(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpoint(f"{path}: tensor {name}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in OTHER_DTYPES:
        raise NotSupported(f"{path}: tensor {name}: dtype {dtype} is not supported")
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
    """Refuse a tensor name that could act as a path or disturb a terminal."""
    if len(name) <= MAX_NAME_LENGTH and _USUAL_NAME.fullmatch(name):
        return
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
    return isinstance(values, list) and set(map(type, values)) <= _INTEGER and min(values, default=0) >= 0


def read_weight_map(index: Path) -> Mapping[str, str]:
    """By the name of each tensor that of its file. Raises CorruptCheckpoint for what is no such index."""
    content = read_bounded(_regular_file(index.parent, index.name), most=MAX_HEADER_BYTES)
    weight_map = load_json(content, index).get("weight_map")
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


def _regular_file(folder: Path, name: str) -> Path:
    """`folder / name`, which must be a file or a link to one: the cache of the hub, volumes and shared storage link."""
    path = folder / name
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        link = f"; it is a link to {path.readlink()}" if path.is_symlink() else ""
        raise CorruptCheckpoint(f"{path}: file is missing{link}") from None
    if not is_regular:
        raise CorruptCheckpoint(f"{path}: is no regular file")
    return path
