"""Tensors of a model folder as views of its files, and the writer that streams tensors into shards."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.header import INDEX_FILE, ITEM_SIZES, SINGLE_FILE, TensorInfo, check_name, read_index
from qnext.files import NewFile, write_inside

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 8 << 20
# Touching one page of a file may map what lies around it, but nothing beyond the table of its page, on x86-64 2 MiB.
_PAGE_TABLE_BYTES = 2 << 20
_WRITE_BACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2  # Linux; Python has no name for it

assert sys.byteorder == "little", "safetensors files are little-endian and are mapped as they are"


class TensorFiles:
    """All tensors of a model folder, mapped into memory.

    >>> with TensorFiles("model") as files:
    ...     norm = files.read("model.norm.weight").clone()
    """

    def __init__(self, folder: str | Path) -> None:
        index = read_index(folder)
        self.folder = index.folder
        self.tensors: dict[str, TensorInfo] = index.tensors
        self._maps: dict[Path, tuple[mmap.mmap, Tensor]] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._maps.clear()

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the file. It must not be written to."""
        info = self.tensors[name]
        return self._view(info, info.start, info.end).view(info.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor flattened, in views of piece_items(name) numbers. The pages of each are given back after it."""
        info = self.tensors[name]
        step = self.piece_items(name) * ITEM_SIZES[info.dtype]
        for start in range(info.start, max(info.end, info.start + 1), step):
            end = min(start + step, info.end)
            yield self._view(info, start, end)
            if info.num_bytes > step:  # the pages of small tensors are mostly read again at once
                self._drop(info.file, start, end)

    def piece_items(self, name: str) -> int:
        """Numbers in each of the pieces of a tensor but the last."""
        return PIECE_BYTES // ITEM_SIZES[self.tensors[name].dtype]

    def expect(self, name: str) -> None:
        """Have the system begin to read a tensor that is wanted soon."""
        info = self.tensors[name]
        if info.num_bytes and hasattr(mmap, "MADV_WILLNEED"):
            mapped, _ = self._map(info.file)
            start = info.start - info.start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, start, info.end - start)

    def drop(self, name: str) -> None:
        """Give the pages of a tensor back to the system; reading it again reads the file again."""
        info = self.tensors[name]
        if info.num_bytes:
            self._drop(info.file, info.start, info.end)

    def _view(self, info: TensorInfo, start: int, end: int) -> Tensor:
        bytes_B = self._map(info.file)[1][start:end]
        if start % ITEM_SIZES[info.dtype]:
            bytes_B = bytes_B.clone()
        return bytes_B.view(TORCH_DTYPES[info.dtype])

    def _drop(self, path: Path, start: int, end: int) -> None:
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        mapped, bytes_B = self._map(path)
        address = bytes_B.data_ptr()
        first = address + start
        start = max(0, first - first % _PAGE_TABLE_BYTES - address)
        end += -(address + end) % _PAGE_TABLE_BYTES
        mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _map(self, path: Path) -> tuple[mmap.mmap, Tensor]:
        if path not in self._maps:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                # torch warns that the map is not writable; nothing here writes to it
                warnings.simplefilter("ignore", UserWarning)
                self._maps[path] = (mapped, torch.frombuffer(mapped, dtype=torch.uint8))
        return self._maps[path]


class TensorSpec(NamedTuple):
    """What will be written under a name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ITEM_SIZES[DTYPE_NAMES[self.dtype]] * torch.Size(self.shape).numel()


class _Shard:
    """One file being written: header first, then each tensor at its place."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        self.missing = set(specs)
        self.file: NewFile | None = None
        self._num_held = 0  # bytes that the system was not yet told to write
        # Wide items first keeps every tensor aligned, which readers that cast bytes in place rely on.
        position, entries = 0, {}
        for name in sorted(specs, key=lambda name: -ITEM_SIZES[DTYPE_NAMES[specs[name].dtype]]):
            spec = specs[name]
            end = position + spec.num_bytes
            entries[name] = {
                "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end],
            }  # fmt: skip
            self.offsets[name] = position
            position = end
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.prefix = len(header).to_bytes(8, "little") + header

    def open(self) -> NewFile:
        file = NewFile(self.path)
        file.write(self.prefix)
        return file

    def write(self, name: str, tensor: Tensor) -> None:
        if self.file is None:
            self.file = self.open()
        self.file.seek(len(self.prefix) + self.offsets[name])
        self.file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.missing.remove(name)
        self._num_held += tensor.nbytes
        if not self.missing:
            self.file.sync()
            self.close()
        elif self._num_held >= _WRITE_BACK_BYTES:
            _start_write_back(self.file.fileno())
            self._num_held = 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _start_write_back(descriptor: int) -> None:
    """Have the system begin to write what it holds of a file, so that the fsync at the end finds little left to do."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


class ShardWriter:
    """Writes the tensors that `plan` announces into `folder`, each once, in any order, none kept in memory.

    Tensors are dealt to shards in the order of `plan`; a shard is as full as `max_shard_bytes` allows, but holds at
    least one tensor. One shard is called model.safetensors, several get an index. `finish` must be called; it
    asserts that nothing is missing.
    """

    def __init__(self, folder: Path, plan: Mapping[str, TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._plan = plan
        groups: list[dict[str, TensorSpec]] = [{}]
        used = 0
        for name, spec in plan.items():
            check_name(name, folder)
            if groups[-1] and used + spec.num_bytes > max_shard_bytes:
                groups.append({})
                used = 0
            groups[-1][name] = spec
            used += spec.num_bytes
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            names = [SINGLE_FILE]
        self._shards = [_Shard(folder / name, group) for name, group in zip(names, groups, strict=True)]
        self._shard_of = {name: shard for shard, group in zip(self._shards, groups, strict=True) for name in group}

    def write(self, name: str, tensor: Tensor) -> None:
        """Store a tensor of exactly the dtype and shape that was announced."""
        spec = self._plan[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, tuple(spec.shape)), (
            name,
            tensor.dtype,
            tensor.shape,
        )
        self._shard_of[name].write(name, tensor)

    def finish(self) -> None:
        missing = [name for shard in self._shards for name in shard.missing]
        assert not missing, f"never written: {missing[:3]}"
        if len(self._shards) > 1:
            total = sum(spec.num_bytes for spec in self._plan.values())
            weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_inside(self._folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file of all the tensors, on the disk, in a folder that is being made."""
    shard = _Shard(path, {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    try:
        if not tensors:
            shard.open().close()
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    finally:
        shard.close()
