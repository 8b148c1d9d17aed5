"""The tensors of a model folder, and the writer that streams tensors into shards."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.header import (
    INDEX_FILE,
    ITEM_SIZES,
    SINGLE_FILE,
    CheckpointIndex,
    TensorInfo,
    check_name,
    index_of,
)
from qnext.checkpoint.reading import TORCH_DTYPES as TORCH_DTYPES
from qnext.checkpoint.reading import FileReader, as_bytes
from qnext.errors import CorruptCheckpoint
from qnext.files import NewFile, sync_folder, write_inside

Progress = Callable[[int, int], None]  # bytes done, bytes in all
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
MAX_SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 8 << 20
_WRITE_BACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2  # Linux; Python has no name for it

assert sys.byteorder == "little", "safetensors files are little-endian and are read as they are"


class TensorFiles:
    """All tensors of a model folder. Each is read into its own memory when it is asked for, by any thread.

    A file that is cut, replaced or written to meanwhile raises CorruptCheckpoint, which names file and tensor. A change
    that no read could see is reported when the block ends.

    >>> with TensorFiles("model") as files:
    ...     norm = files.read("model.norm.weight")
    """

    def __init__(self, source: str | Path | CheckpointIndex) -> None:
        index = index_of(source)
        self.folder = index.folder
        self.tensors: dict[str, TensorInfo] = index.tensors
        self._reader = FileReader(index.files)
        self._kept = threading.local()  # the last buffer of each thread

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
            self._kept = threading.local()

    def release(self, path: Path) -> None:
        """Close a file. Raises CorruptCheckpoint where it changed since its header was read."""
        self._reader.release(path)

    def read(self, name: str) -> Tensor:
        """Read a whole tensor."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        self._reader.read_into(info, info.start, as_bytes(tensor))
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> Tensor:
        """Read the rows [start, end) of a matrix. The range must lie inside the matrix."""
        info = self.tensors[name]
        assert 0 <= start <= end <= info.shape[0], (name, start, end)
        rows = torch.empty((end - start, *info.shape[1:]), dtype=TORCH_DTYPES[info.dtype])
        self._reader.read_into(info, info.start + start * (info.num_bytes // info.shape[0]), as_bytes(rows))
        return rows

    def read_bytes(self, info: TensorInfo, start: int, count: int, *, into: Tensor | None = None) -> Tensor:
        """`count` bytes of a tensor from its byte `start` on, in memory of their own or in that of `into`."""
        assert 0 <= start <= start + count <= info.num_bytes, (info, start, count)
        bytes_B = torch.empty(count, dtype=torch.uint8) if into is None else into
        assert bytes_B.shape == (count,), (bytes_B.shape, count)
        self._reader.read_into(info, info.start + start, bytes_B)
        return bytes_B

    def pieces(self, name: str, *, into: Tensor | None = None) -> Iterator[Tensor]:
        """The tensor flattened, in pieces of piece_items(name) numbers. Each piece is valid until the next is asked
        for.

        With `into`, a contiguous tensor of the same dtype and size, the pieces are parts of it and stay valid.
        """
        info = self.tensors[name]
        item = ITEM_SIZES[info.dtype]
        step, count = self.piece_items(name), info.num_bytes // item
        # Each loop has a buffer of its own. The last one is kept, for most loops follow each other.
        kept = vars(self._kept)
        buffer_B = kept.pop("buffer_B", None)
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
        kept["buffer_B"] = buffer_B

    def piece_items(self, name: str) -> int:
        """Numbers in each piece of a tensor except the last."""
        return PIECE_BYTES // ITEM_SIZES[self.tensors[name].dtype]

    def expect(self, name: str) -> None:
        """Have the system begin to read a tensor that will be needed soon."""
        self._reader.expect(self.tensors[name])


class TensorSpec(NamedTuple):
    """The tensor that will be written under a name, at a multiple of `alignment` bytes of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    alignment: int = 1

    @property
    def num_bytes(self) -> int:
        return ITEM_SIZES[DTYPE_NAMES[self.dtype]] * torch.Size(self.shape).numel()


class _Shard:
    """One file being written: header first, then each tensor at its place. `written` are there from an earlier run.

    Raises CorruptCheckpoint where they are not.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], written: Container[str] = ()) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        # bytes that were not written
        self.missing = {name: spec.num_bytes for name, spec in specs.items() if name not in written}
        self._is_begun = len(self.missing) < len(specs)
        self.file: NewFile | None = None
        self._num_held = 0  # bytes that the system was not yet told to write
        # What is aligned comes first, and of all else wide items, which readers that cast bytes in place rely on.
        position, entries = 0, {}
        for name, spec in sorted(specs.items(), key=_place_in_shard):
            assert position % spec.alignment == 0, name
            end = position + spec.num_bytes
            entries[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            self.offsets[name] = position
            position = end
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % max([8, *(spec.alignment for spec in specs.values())]))
        self.prefix = len(header).to_bytes(8, "little") + header
        if self._is_begun:
            self._check_begun(max(self.offsets[name] + specs[name].num_bytes for name in specs if name in written))

    def _check_begun(self, num_bytes: int) -> None:
        try:
            with self.path.open("rb") as file:
                is_ours = file.read(len(self.prefix)) == self.prefix
                is_ours &= file.seek(0, os.SEEK_END) >= len(self.prefix) + num_bytes
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            raise CorruptCheckpoint(f"{self.path}: is not what an earlier run has written")

    def open(self) -> NewFile:
        if self._is_begun:
            return NewFile(self.path, flags=0)
        file = NewFile(self.path, flags=os.O_CREAT | os.O_TRUNC)  # an earlier run may have recorded nothing of its own
        file.write(self.prefix)
        return file

    def write(self, name: str, tensor: Tensor, row: int) -> None:
        if self.file is None:
            self.file = self.open()
        row_bytes = tensor.nbytes // max(1, len(tensor)) if row else 0
        self.file.seek(len(self.prefix) + self.offsets[name] + row * row_bytes)
        self.file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.missing[name] -= tensor.nbytes
        assert self.missing[name] >= 0, name
        if not self.missing[name]:
            del self.missing[name]
        self._num_held += tensor.nbytes
        if not self.missing:
            self.file.sync()
            self.close()
        elif self._num_held >= _WRITE_BACK_BYTES:
            _start_write_back(self.file.fileno())
            self._num_held = 0

    def sync(self) -> None:
        """What was written is on the disk when it returns."""
        if self.file is not None and self.missing:
            self.file.sync()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _place_in_shard(item: tuple[str, TensorSpec]) -> tuple[int, int]:
    return -item[1].alignment, -ITEM_SIZES[DTYPE_NAMES[item[1].dtype]]


def _start_write_back(descriptor: int) -> None:
    """Have the system begin to write what it holds of a file, so that the fsync at the end finds little left to do."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function(descriptor, 0, 0, _SYNC_FILE_RANGE_WRITE)


class ShardWriter:
    """Writes the tensors that `plan` announces into `folder`, each once, in any order. It keeps none in memory.

    Tensors are dealt to shards in the order of `plan`; a shard is as full as `max_shard_bytes` allows, but holds at
    least one tensor, and the first aligned one begins a shard. One shard is called model.safetensors, several get an
    index. `finish` must be called; it asserts that nothing is missing. `written` lie there already, from an earlier run
    with the same plan.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        written: Container[str] = (),
    ) -> None:
        self._folder = folder
        self._plan = plan
        groups: list[dict[str, TensorSpec]] = [{}]
        used, is_aligned = 0, False
        for name, spec in plan.items():
            check_name(name, folder)
            begins_aligned = spec.alignment > 1 and not is_aligned
            is_aligned |= begins_aligned
            if groups[-1] and (begins_aligned or used + spec.num_bytes > max_shard_bytes):
                groups.append({})
                used = 0
            groups[-1][name] = spec
            used += spec.num_bytes
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        if len(groups) == 1:
            names = [SINGLE_FILE]
        self._shards = [_Shard(folder / name, group, written) for name, group in zip(names, groups, strict=True)]
        self._shard_of = {name: shard for shard, group in zip(self._shards, groups, strict=True) for name in group}

    def write(self, name: str, tensor: Tensor, *, row: int | None = None) -> None:
        """Store a tensor of exactly the dtype and shape that was announced, or some of its rows, from `row` on."""
        spec = self._plan[name]
        announced = tuple(spec.shape) if row is None else (len(tensor), *spec.shape[1:])
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, announced), (name, tensor.dtype, tensor.shape)
        assert row is None or 0 <= row <= spec.shape[0] - len(tensor), (name, row)
        self._shard_of[name].write(name, tensor, row or 0)

    def sync(self) -> None:
        """All that was written is on the disk when it returns."""
        for shard in self._shards:
            shard.sync()
        sync_folder(self._folder)

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
    """Write one file with all the tensors, flushed to the disk, in a folder that is being made."""
    shard = _Shard(path, {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    try:
        if not tensors:
            shard.open().close()
        for name, tensor in tensors.items():
            shard.write(name, tensor, 0)
    finally:
        shard.close()
