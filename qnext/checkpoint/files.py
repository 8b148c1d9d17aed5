"""Tensors of a model folder, and the writer that streams tensors into shards."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.header import INDEX_FILE, ITEM_SIZES, SINGLE_FILE, TensorInfo, check_name, read_index
from qnext.checkpoint.reading import TORCH_DTYPES as TORCH_DTYPES
from qnext.checkpoint.reading import FileReader, as_bytes
from qnext.files import NewFile, write_inside

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 8 << 20
_WRITE_BACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2  # Linux; Python has no name for it

assert sys.byteorder == "little", "safetensors files are little-endian and are read as they are"


class TensorFiles:
    """All tensors of a model folder, read into memory of their own when they are asked for.

    A file that is cut, replaced or written to meanwhile raises CorruptCheckpoint, which names file and tensor. What
    no read could see is told when the block ends.

    >>> with TensorFiles("model") as files:
    ...     norm = files.read("model.norm.weight")
    """

    def __init__(self, folder: str | Path) -> None:
        index = read_index(folder)
        self.folder = index.folder
        self.tensors: dict[str, TensorInfo] = index.tensors
        self._reader = FileReader(index.files)
        self._buffer_B: Tensor | None = None

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._reader.check()
        finally:
            self._reader.close()
            self._buffer_B = None

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        self._reader.read_into(info, info.start, as_bytes(tensor))
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a matrix, which has them all."""
        info = self.tensors[name]
        assert 0 <= start <= end <= info.shape[0], (name, start, end)
        rows = torch.empty((end - start, *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
        self._reader.read_into(info, info.start + start * (info.num_bytes // info.shape[0]), as_bytes(rows))
        return rows

    def pieces(self, name: str, *, into: Tensor | None = None) -> Iterator[Tensor]:
        """The tensor flattened, piece_items(name) numbers at a time, each valid until the next is asked for.

        A contiguous tensor `into` of the same dtype and size is filled with them: then they are parts of it, and stay.
        """
        info = self.tensors[name]
        item = ITEM_SIZES[info.dtype]
        step, count = self.piece_items(name), info.num_bytes // item
        # Each loop has a buffer of its own. The last one is kept, for most loops follow each other.
        buffer_B, self._buffer_B = self._buffer_B, None
        if buffer_B is None:
            buffer_B = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        for first in range(0, max(1, count), step):
            num_items = min(step, count - first)
            if into is None:
                piece = buffer_B[: num_items * item].view(TORCH_DTYPES[info.dtype])
            else:
                piece = into.view(-1)[first : first + num_items]
            self._reader.read_into(info, info.start + first * item, as_bytes(piece))
            yield piece
        self._buffer_B = buffer_B

    def piece_items(self, name: str) -> int:
        """Numbers in each of the pieces of a tensor but the last."""
        return PIECE_BYTES // ITEM_SIZES[self.tensors[name].dtype]

    def expect(self, name: str) -> None:
        """Have the system begin to read a tensor that is wanted soon."""
        self._reader.expect(self.tensors[name])


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
