"""Reads the bytes of a checkpoint's files into memory of its own.

Nothing is mapped. A failing disk, or another process that cuts a file while it is read, would end a process with a
mapped file by SIGBUS. A read that returns too few bytes is an error that names the file.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from qnext.checkpoint.header import FileState, TensorInfo, read_header
from qnext.errors import CorruptCheckpoint

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_MOST_OPEN = 64  # a folder may have more shards than a process may open files
_MOST_AT_ONCE = 16 << 20  # bytes of one call, between two of which a signal is handled


class FileReader:
    """Reads ranges of files that must not change after their headers were read. Any thread may read.

    Descriptors are opened when they are needed. The last few are kept open, and `close` closes all.
    """

    def __init__(self, states: Mapping[Path, FileState]) -> None:
        self._states = states
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = Lock()  # of the descriptors

    def read_into(self, info: TensorInfo, start: int, bytes_B: Tensor) -> None:
        """Fill a contiguous uint8 tensor with the bytes of the file of `info` from `start` on.

        Raises CorruptCheckpoint naming file and tensor where the file ends too early, changed, or cannot be read.
        """
        view = bytes_B.numpy().data
        try:
            with self._own_descriptor(info.file) as descriptor:
                done = 0
                while done < len(view):
                    count = os.preadv(descriptor, [view[done : done + _MOST_AT_ONCE]], start + done)
                    if count == 0:
                        size = os.fstat(descriptor).st_size
                        raise CorruptCheckpoint(
                            f"{info.file}: truncated while tensor {info.name} was read ({size} of {info.end} bytes)"
                        )
                    done += count
        except OSError as error:
            raise CorruptCheckpoint(f"{info.file}: tensor {info.name} cannot be read: {error.strerror}") from None

    def expect(self, info: TensorInfo) -> None:
        """Have the system begin to read a tensor that will be needed soon."""
        if info.num_bytes and hasattr(os, "posix_fadvise"):
            with self._own_descriptor(info.file) as descriptor:
                os.posix_fadvise(descriptor, info.start, info.num_bytes, os.POSIX_FADV_WILLNEED)

    def check(self) -> None:
        """Raise CorruptCheckpoint where a file was written to since its header was read, although no read returned too
        few bytes."""
        for path, descriptor in self._open.items():
            self._check(path, descriptor)

    def release(self, path: Path) -> None:
        """Close a file that nobody reads, with the same check."""
        with self._lock:
            descriptor = self._open.pop(path, None)
        if descriptor is not None:
            try:
                self._check(path, descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    @contextmanager
    def _own_descriptor(self, path: Path) -> Iterator[int]:
        """A descriptor of the caller's own: another thread may close the one that is kept."""
        with self._lock:
            descriptor = os.dup(self._descriptor(path))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= _MOST_OPEN:
            oldest, descriptor = self._open.popitem(last=False)
            try:
                self._check(oldest, descriptor)
            finally:
                os.close(descriptor)
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._check(path, self._open[path])
        return self._open[path]

    def _check(self, path: Path, descriptor: int) -> None:
        now, then = FileState.of(os.fstat(descriptor)), self._states[path]
        # A file that became shorter is told by the tensor that is cut.
        if now != then and now.num_bytes >= then.num_bytes:
            raise CorruptCheckpoint(f"{path}: changed while it was read; is it being written?")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file that qnext wrote. Raises CorruptCheckpoint as read_header and FileReader do."""
    infos = read_header(path, any_name=True)
    reader = FileReader({path: FileState.of(path.stat())})
    try:
        tensors = {name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype]) for name, info in infos.items()}
        for name, info in infos.items():
            reader.read_into(info, info.start, as_bytes(tensors[name]))
        reader.check()
    finally:
        reader.close()
    return tensors


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes [B] of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)
