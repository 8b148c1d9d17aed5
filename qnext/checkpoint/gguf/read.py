"""A GGUF file to a model folder, tensor by tensor.

Legend: R rows, I inputs, B bytes of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.described import describe
from qnext.checkpoint.files import MAX_SHARD_BYTES, Progress
from qnext.checkpoint.finite import is_finite
from qnext.checkpoint.gguf.block_types import KEPT_BITS, BlockType
from qnext.checkpoint.gguf.blocks import decode, integer_codes
from qnext.checkpoint.gguf.container import GgufFile
from qnext.checkpoint.gguf.names import Change, GgufEntry, Slab, gguf_entries, matrix_shape, slabs
from qnext.checkpoint.gguf.origin import gguf_parent
from qnext.checkpoint.gguf.packing import GROUP_SIZE, packed_parameters, weight_forms
from qnext.checkpoint.gguf.parts import read_gguf
from qnext.checkpoint.gguf.read_keys import config_from_keys
from qnext.checkpoint.gguf.structure import check_structure, scale_name
from qnext.checkpoint.names import Part, parts_by_expert
from qnext.checkpoint.provenance import Making
from qnext.checkpoint.record_output import record_writer
from qnext.checkpoint.save import new_folder, write_side_files
from qnext.checkpoint.sink import ShardSink
from qnext.config import ModelConfig, to_hf
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.files import write_inside
from qnext.ops import QuantizedWeight
from qnext.ops.quantized import pack_codes
from qnext.planning import Kind, list_parameters

_CHUNK_ITEMS = 1 << 22
# Small matrices that converters leave in fp32 beside quantised ones, though llama.cpp does not ask for it.
_ALSO_FINE = Kind.DELTA_BA
_CLOSE = 2.0**-22  # relative: what two roundings of an exponential to fp32 may differ by


class ImportReport(NamedTuple):
    """What happened to the tensors of the file, by name. `dtype` is that of all tensors that are not packed.

    `packed` tensors kept codes and scales. `dequantized` ones were quantised and are not now. `rounded` ones were
    floats of a finer dtype.
    """

    dtype: torch.dtype
    packed: tuple[str, ...]
    dequantized: tuple[str, ...]
    rounded: tuple[str, ...]


@torch.no_grad()
def import_gguf(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    with_records: bool = False,
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> ImportReport:
    """Write the model of a GGUF file, or of all parts of a split one, to a new folder in Hugging Face's form.

    Q8_0 and Q4_0 keep their codes, in compressed-tensors' layout or in records, unless `dequantize`. Matrices are
    rounded to `dtype`, or to the file's own, and the report names them. Vectors, routers, convolutions and the b and a
    projections stay in fp32 where `dtype` cannot hold them. Raises CorruptCheckpoint or NotSupported naming file and
    key or tensor, UsageError when `folder` exists and is not empty, a number does not fit into `dtype` or experts make
    no records.
    """
    file = read_gguf(path)
    config = config_from_keys(file)
    entries = gguf_entries(config, present=file.tensors)
    check_structure(file, config, entries)
    chosen = dtype or _matrix_dtype(file, entries)
    packed = {} if dequantize else packed_parameters(config, file, entries)
    with ExitStack() as streams:
        reader = _RowReader(file, streams)
        vectors = {
            entry.parameter.name: _as_vector(reader, entry, chosen) for entry in entries if len(entry.shape) == 1
        }
        dtypes = dict.fromkeys(list_parameters(config), chosen) | {n: v.dtype for n, v in vectors.items()}
        dtypes |= {entry.parameter.name: torch.float32 for entry in entries if _stays_fine(reader, entry, chosen)}
        forms = weight_forms(config, dtypes, packed)
        records = record_writer(config, forms.values(), name=path) if with_records else None
        sink = ShardSink(forms, records=records, max_shard_bytes=max_shard_bytes)
        settings = {"from": "gguf", "dtype": str(chosen).removeprefix("torch."), "dequantize": dequantize or None}
        making = Making("convert", {**settings, "records": with_records or None}, [gguf_parent(file)])
        with new_folder(folder, making=making) as temporary:
            _write_config(temporary, config, chosen, describe(forms.values(), config=config, records=records))
            write_side_files(temporary, config, tokenizer_folder, None)
            try:
                sink.begin(temporary)
                total = sum(tensor.end - tensor.start for tensor in file.tensors.values())
                for part, weight in _disk_weights(reader, config, entries, vectors, packed, dtypes):
                    sink.add(part, weight)
                    if progress is not None:
                        progress(min(reader.num_bytes, total), total)
                sink.finish()
            finally:
                sink.close()
    quantised = [entry for entry in entries if file.tensors[entry.name].block.num_items > 1]
    return ImportReport(
        chosen,
        packed=tuple(entry.name for entry in quantised if entry.parameter.name in packed),
        dequantized=tuple(entry.name for entry in quantised if entry.parameter.name not in packed),
        rounded=tuple(name for name in reader.rounded if file.tensors[name].block.num_items == 1),
    )


def _write_config(folder: Path, config: ModelConfig, dtype: torch.dtype, quantization: dict[str, Any] | None) -> None:
    values = to_hf(config, dtype=str(dtype).removeprefix("torch."))
    if quantization is not None:
        values["quantization_config"] = quantization
    write_inside(folder / "config.json", json.dumps(values, indent=2) + "\n")


class _RowReader:
    """Rows of the file's tensors in fp32, as a folder has them. Keeps the names of those that were rounded.

    The files are opened when they are first read and closed with `streams`.
    """

    def __init__(self, file: GgufFile, streams: ExitStack) -> None:
        self.file = file
        self.num_bytes = 0
        self.rounded: dict[str, None] = {}
        self._streams = streams
        self._open: dict[Path, BinaryIO] = {}

    def raw(self, entry: GgufEntry, start: int, end: int) -> Tensor:
        """Bytes [R, B] of rows [start, end) of the tensor."""
        tensor = self.file.tensors[entry.name]
        row_bytes = entry.shape[-1] // tensor.block.num_items * tensor.block.num_bytes
        buffer = bytearray((end - start) * row_bytes)
        stream = self._open.get(tensor.path)
        if stream is None:
            stream = self._open[tensor.path] = self._streams.enter_context(tensor.path.open("rb"))
        stream.seek(tensor.start + start * row_bytes)
        if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise self.error(tensor.name, "truncated while it was read")
        self.num_bytes += len(buffer)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(end - start, row_bytes)

    def error(self, name: str, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.file.tensors[name].path}: tensor {name}: {problem}")

    def scale(self, entry: GgufEntry, row: int) -> float:
        """What the row is multiplied by: some files keep a factor for a tensor, or for each expert, beside it."""
        tensor = self.file.tensors.get(scale_name(entry.name))
        if tensor is None:
            return 1.0
        num_scales = torch.Size(tensor.shape).numel()
        beside = GgufEntry(tensor.name, (num_scales,), entry.parameter, Change.NONE)
        scales = decode(self.raw(beside, 0, 1), tensor.block)[0]
        if not is_finite(scales):
            raise self.error(tensor.name, "holds NaN or infinity")
        return float(scales[row // entry.shape[1] if num_scales > 1 else 0])

    def raw_chunks(self, entry: GgufEntry, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, bytes) over rows [start, end), a few million numbers at a time."""
        step = max(1, _CHUNK_ITEMS // entry.shape[-1])
        for first in range(start, end, step):
            yield first, self.raw(entry, first, min(first + step, end))

    def chunks(self, entry: GgufEntry, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 rows as the file has them) over rows [start, end)."""
        scale = self.scale(entry, start)
        for first, raw_RB in self.raw_chunks(entry, start, end):
            x_RI = decode(raw_RB, self.file.tensors[entry.name].block) * scale
            if not is_finite(x_RI):
                raise self.error(entry.name, "holds NaN or infinity")
            yield first, x_RI


def _matrix_dtype(file: GgufFile, entries: list[GgufEntry]) -> torch.dtype:
    kinds = {file.tensors[entry.name].block.name for entry in entries if not entry.is_float32}
    if kinds <= {"F32", "F64"}:
        return torch.float32
    return torch.float16 if kinds == {"F16"} else torch.bfloat16


def _stays_fine(reader: _RowReader, entry: GgufEntry, dtype: torch.dtype) -> bool:
    """Whether a small matrix that the file keeps in fp32 holds numbers that `dtype` has not."""
    is_kept = entry.is_float32 or entry.parameter.kind is _ALSO_FINE
    if len(entry.shape) == 1 or not is_kept or reader.file.tensors[entry.name].block.name != "F32":
        return False
    rows = (0, matrix_shape(entry.shape)[0])
    return not all(torch.equal(x_RI.to(dtype).to(torch.float32), x_RI) for _, x_RI in reader.chunks(entry, *rows))


def _as_vector(reader: _RowReader, entry: GgufEntry, dtype: torch.dtype) -> Tensor:
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


def _disk_weights(
    reader: _RowReader,
    config: ModelConfig,
    entries: list[GgufEntry],
    vectors: Mapping[str, Tensor],
    packed: Mapping[str, BlockType],
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[Part, Tensor | QuantizedWeight]]:
    """Every weight of the folder."""
    places: dict[str, list[tuple[GgufEntry, Slab]]] = {}
    for entry in entries:
        for slab in slabs(config, entry) if entry.parameter.name not in vectors else ():
            places.setdefault(slab.disk_name, []).append((entry, slab))
    for info, part in parts_by_expert(list_parameters(config).values()):
        if info.name in vectors:
            yield part, vectors[info.name]
        elif info.name in packed:
            yield part, _packed(reader, part.shape, places[part.name])
        else:
            yield part, _assembled(reader, part.shape, places[part.name], dtypes[info.name])


def _assembled(
    reader: _RowReader, shape: tuple[int, ...], places: list[tuple[GgufEntry, Slab]], dtype: torch.dtype
) -> Tensor:
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


def _packed(reader: _RowReader, shape: tuple[int, ...], places: list[tuple[GgufEntry, Slab]]) -> QuantizedWeight:
    num_rows, num_inputs = shape
    block = reader.file.tensors[places[0][0].name].block
    bits = KEPT_BITS[block.name]
    codes_RB = torch.empty(num_rows, num_inputs * bits // 8, dtype=torch.uint8)
    scales_RN = torch.empty(num_rows, num_inputs // GROUP_SIZE, dtype=torch.float16)
    for entry, slab in places:
        for first, raw_RB in reader.raw_chunks(entry, *slab.rows):
            codes_RI, scales = integer_codes(raw_RB, block)
            if not is_finite(scales):
                raise reader.error(entry.name, "holds NaN or infinity")
            start = slab.disk_rows[0] + first - slab.rows[0]
            codes_RB[start : start + len(codes_RI)] = pack_codes(codes_RI, bits=bits)
            scales_RN[start : start + len(codes_RI)] = scales
    return QuantizedWeight(codes_RB, scales_RN, bits, GROUP_SIZE)
