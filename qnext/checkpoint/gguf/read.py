"""A GGUF file becomes a model folder, tensor by tensor.

Legend: R rows, I inputs, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.files import MAX_SHARD_BYTES, ShardWriter
from qnext.checkpoint.gguf.blocks import decode
from qnext.checkpoint.gguf.container import GgufFile, GgufTensor, read_gguf
from qnext.checkpoint.gguf.keys import config_from_keys
from qnext.checkpoint.gguf.names import Change, Entry, Slab, gguf_entries, slabs
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.save import disk_plan, new_folder, write_config, write_side_files
from qnext.checkpoint.values import is_finite
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.planning import parameter_shapes

_CHUNK_ITEMS = 1 << 22
_CLOSE = 2.0**-22  # relative: what two roundings of an exponential to fp32 may differ by


class ImportReport(NamedTuple):
    """What became of the numbers: tensors of the file whose values the folder's dtype could only round."""

    dtype: torch.dtype
    dequantized: tuple[str, ...]
    rounded: tuple[str, ...]


@torch.no_grad()
def import_gguf(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write the model of a GGUF file to a new folder as Hugging Face names and shapes it.

    `dtype` None is that of the file's matrices, bfloat16 where they are quantised. Vectors that `dtype` cannot hold
    exactly stay in fp32; matrices are rounded to it, and the report names them. Tokenizer files are copied from
    `tokenizer_folder`. Memory stays near one tensor of the folder. Raises CorruptCheckpoint naming file and key or
    tensor, UsageError when `folder` exists and is not empty or a number does not fit in `dtype`.
    """
    file = read_gguf(path)
    config = config_from_keys(file)
    entries = gguf_entries(config, present=file.tensors)
    _check_structure(file, entries)
    chosen = dtype or _matrix_dtype(file, entries)
    with file.path.open("rb") as stream:
        reader = _Rows(file, stream)
        vectors = {
            entry.parameter: _as_vector(reader, entry, chosen) for entry in entries if len(entry.shape) == 1
        }  # fmt: skip
        dtypes = dict.fromkeys(parameter_shapes(config), chosen) | {n: v.dtype for n, v in vectors.items()}
        with new_folder(folder) as temporary:
            write_config(temporary, config, dtype=chosen)
            write_side_files(temporary, config, tokenizer_folder, None)
            writer = ShardWriter(temporary, disk_plan(config, dtypes), max_shard_bytes=max_shard_bytes)
            try:
                total = sum(tensor.end - tensor.start for tensor in file.tensors.values())
                for name, tensor in _disk_tensors(reader, config, entries, vectors, chosen):
                    writer.write(name, tensor)
                    if progress is not None:
                        progress(min(reader.num_bytes, total), total)
                writer.finish()
            finally:
                writer.close()
    kinds = {entry.name: file.tensors[entry.name].block for entry in entries}
    dequantized = tuple(name for name, block in kinds.items() if block.num_items > 1)
    return ImportReport(chosen, dequantized, tuple(n for n in reader.rounded if kinds[n].num_items == 1))


class _Rows:
    """Rows of the file's tensors in fp32, as a folder has them. Keeps the names of those that were rounded."""

    def __init__(self, file: GgufFile, stream: BinaryIO) -> None:
        self.file = file
        self.stream = stream
        self.num_bytes = 0
        self.rounded: dict[str, None] = {}

    def raw(self, tensor: GgufTensor, start: int, end: int) -> Tensor:
        """Bytes [R, B] of rows [start, end)."""
        row_bytes = tensor.shape[-1] // tensor.block.num_items * tensor.block.num_bytes
        buffer = bytearray((end - start) * row_bytes)
        self.stream.seek(tensor.start + start * row_bytes)
        if self.stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise self.error(tensor.name, "truncated while it was read")
        self.num_bytes += len(buffer)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(end - start, row_bytes)

    def error(self, name: str, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.file.path}: tensor {name}: {problem}")

    def chunks(self, entry: Entry, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 rows as the file has them) over rows [start, end)."""
        tensor = self.file.tensors[entry.name]
        step = max(1, _CHUNK_ITEMS // tensor.shape[-1])
        for first in range(start, end, step):
            x_RI = decode(self.raw(tensor, first, min(first + step, end)), tensor.block)
            if not is_finite(x_RI):
                raise self.error(entry.name, "holds NaN or infinity")
            yield first, x_RI


def _check_structure(file: GgufFile, entries: list[Entry]) -> None:
    for entry in entries:
        if entry.name not in file.tensors:
            raise CorruptCheckpoint(f"{file.path}: tensor {entry.name} is missing")
        shape = file.tensors[entry.name].shape
        # Some tools drop leading dimensions of one.
        if _without_ones(shape) != _without_ones(entry.shape):
            raise CorruptCheckpoint(
                f"{file.path}: tensor {entry.name} has shape {list(shape)}, the keys ask for {list(entry.shape)}"
            )
    surplus = file.tensors.keys() - {entry.name for entry in entries}
    for name in sorted(surplus):
        raise CorruptCheckpoint(f"{file.path}: tensor {name} is surplus: the keys describe no such tensor")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _matrix_dtype(file: GgufFile, entries: list[Entry]) -> torch.dtype:
    kinds = {file.tensors[entry.name].block.name for entry in entries if not entry.is_float32}
    if kinds == {"F32"}:
        return torch.float32
    return torch.float16 if kinds == {"F16"} else torch.bfloat16


def _as_vector(reader: _Rows, entry: Entry, dtype: torch.dtype) -> Tensor:
    """A vector in `dtype` where that stands for the same number of the file, else in fp32."""
    ((_, stored_1I),) = reader.chunks(entry, 0, 1)
    if entry.change is Change.NEGATIVE_EXP and not bool((stored_1I < 0).all()):
        raise reader.error(entry.name, "must be negative: it is -exp(A_log)")
    exact = _restored(stored_1I, entry.change)
    rounded = exact.to(dtype)
    if entry.change is Change.NEGATIVE_EXP:
        again = rounded.to(torch.float64).exp().neg()
        is_same = torch.allclose(again, stored_1I.to(torch.float64), rtol=_CLOSE, atol=0.0)
    else:
        again = rounded.to(torch.float32) + (1 if entry.change is Change.PLUS_ONE else 0)
        is_same = torch.equal(again, stored_1I)
    return (rounded if is_same else exact)[0]


def _restored(x_RI: Tensor, change: Change) -> Tensor:
    if change is Change.PLUS_ONE:
        return x_RI - 1
    if change is Change.NEGATIVE_EXP:
        return x_RI.to(torch.float64).neg().log().to(torch.float32)
    return x_RI


def _disk_tensors(
    reader: _Rows, config: ModelConfig, entries: list[Entry], vectors: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder by name, in its order."""
    by_parameter: dict[str, list[Entry]] = {}
    for entry in entries:
        by_parameter.setdefault(entry.parameter, []).append(entry)
    for name, shape in parameter_shapes(config).items():
        if name in vectors:
            yield name, vectors[name]
            continue
        places: dict[str, list[tuple[Entry, Slab]]] = {}
        for entry in by_parameter[name]:
            for slab in slabs(config, entry):
                places.setdefault(slab.disk_name, []).append((entry, slab))
        for part in disk_parts(name, shape):
            yield part.name, _assembled(reader, part.shape, places[part.name], dtype)


def _assembled(
    reader: _Rows, shape: tuple[int, ...], places: list[tuple[Entry, Slab]], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    num_inputs = places[0][0].shape[-1]
    out_RI = torch.empty(torch.Size(shape).numel() // num_inputs, num_inputs, dtype=dtype)
    for entry, slab in places:
        for first, x_RI in reader.chunks(entry, *slab.rows):
            start = slab.disk_rows[0] + first - slab.rows[0]
            target = out_RI[start : start + x_RI.shape[0]]
            target.copy_(x_RI)
            if not torch.equal(target.to(torch.float32), x_RI):
                reader.rounded[entry.name] = None
                if not is_finite(target):
                    raise UsageError(
                        f"{reader.file.path}: tensor {entry.name} holds numbers beyond the range of {dtype}"
                    )
    return out_RI.view(shape)
