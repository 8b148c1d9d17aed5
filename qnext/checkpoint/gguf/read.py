"""A GGUF file becomes a model folder, tensor by tensor.

Legend: R rows, I inputs, B bytes of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.files import MAX_SHARD_BYTES, ShardWriter
from qnext.checkpoint.finite import is_finite
from qnext.checkpoint.gguf.block_types import KEPT_BITS, BlockType
from qnext.checkpoint.gguf.blocks import decode, integer_codes
from qnext.checkpoint.gguf.container import GgufFile
from qnext.checkpoint.gguf.names import Change, Entry, Slab, gguf_entries, matrix_shape, slabs
from qnext.checkpoint.gguf.packing import GROUP_SIZE, packed_parameters, packed_plan, quantization_config
from qnext.checkpoint.gguf.parts import read_gguf
from qnext.checkpoint.gguf.read_keys import config_from_keys
from qnext.checkpoint.gguf.structure import check_structure, scale_name
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.save import disk_plan, new_folder, write_side_files
from qnext.config import ModelConfig, to_hf
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.files import write_inside
from qnext.planning import parameter_shapes
from qnext.quant.formats import pack_words, packed_width

_CHUNK_ITEMS = 1 << 22
# Small matrices that converters leave in fp32 beside quantised ones, though llama.cpp does not ask for it.
_ALSO_FINE = "ssm_ba.weight"
_CLOSE = 2.0**-22  # relative: what two roundings of an exponential to fp32 may differ by


class ImportReport(NamedTuple):
    """What became of the tensors of the file, by name. `dtype` is that of all that is not packed.

    `packed` kept codes and scales, `dequantized` were quantised and are not; `rounded` were floats of a finer dtype.
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
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Write the model of a GGUF file, or of all parts of a split one, to a new folder as Hugging Face shapes it.

    Q8_0 and Q4_0 stay as they are, in the layout of compressed-tensors, unless `dequantize`. `dtype` None is that of
    the file's matrices, bfloat16 where they are quantised. Vectors, routers, convolutions and the b and a projections
    that `dtype` cannot hold exactly stay in fp32; the other matrices are rounded to it, and the report names them.
    Tokenizer files are copied from `tokenizer_folder`. Memory stays near one tensor of the folder. Raises
    CorruptCheckpoint or NotSupported naming file and key or tensor, UsageError when `folder` exists and is not empty or
    a number does not fit in `dtype`.
    """
    file = read_gguf(path)
    config = config_from_keys(file)
    entries = gguf_entries(config, present=file.tensors)
    check_structure(file, config, entries)
    chosen = dtype or _matrix_dtype(file, entries)
    packed = {} if dequantize else packed_parameters(config, file, entries)
    with ExitStack() as streams:
        reader = _Rows(file, streams)
        vectors = {entry.parameter: _as_vector(reader, entry, chosen) for entry in entries if len(entry.shape) == 1}
        dtypes = dict.fromkeys(parameter_shapes(config), chosen) | {n: v.dtype for n, v in vectors.items()}
        dtypes |= {entry.parameter: torch.float32 for entry in entries if _stays_fine(reader, entry, chosen)}
        plan = packed_plan(config, disk_plan(config, dtypes), packed)
        with new_folder(folder) as temporary:
            _write_config(temporary, config, chosen, packed)
            write_side_files(temporary, config, tokenizer_folder, None)
            writer = ShardWriter(temporary, plan, max_shard_bytes=max_shard_bytes)
            try:
                total = sum(tensor.end - tensor.start for tensor in file.tensors.values())
                for name, tensor in _disk_tensors(reader, config, entries, vectors, packed, dtypes):
                    writer.write(name, tensor)
                    if progress is not None:
                        progress(min(reader.num_bytes, total), total)
                writer.finish()
            finally:
                writer.close()
    quantised = [entry for entry in entries if file.tensors[entry.name].block.num_items > 1]
    return ImportReport(
        chosen,
        packed=tuple(entry.name for entry in quantised if entry.parameter in packed),
        dequantized=tuple(entry.name for entry in quantised if entry.parameter not in packed),
        rounded=tuple(name for name in reader.rounded if file.tensors[name].block.num_items == 1),
    )


def _write_config(folder: Path, config: ModelConfig, dtype: torch.dtype, packed: Mapping[str, BlockType]) -> None:
    values = to_hf(config, dtype=str(dtype).removeprefix("torch."))
    if packed:
        values["quantization_config"] = quantization_config(config, packed)
    write_inside(folder / "config.json", json.dumps(values, indent=2) + "\n")


class _Rows:
    """Rows of the file's tensors in fp32, as a folder has them. Keeps the names of those that were rounded.

    The files are opened when they are first read and closed with `streams`.
    """

    def __init__(self, file: GgufFile, streams: ExitStack) -> None:
        self.file = file
        self.num_bytes = 0
        self.rounded: dict[str, None] = {}
        self._streams = streams
        self._open: dict[Path, BinaryIO] = {}

    def raw(self, entry: Entry, start: int, end: int) -> Tensor:
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

    def scale(self, entry: Entry, row: int) -> float:
        """What the row is multiplied by: some files keep a factor for a tensor, or for each expert, beside it."""
        tensor = self.file.tensors.get(scale_name(entry.name))
        if tensor is None:
            return 1.0
        num_scales = torch.Size(tensor.shape).numel()
        beside = Entry(tensor.name, (num_scales,), entry.parameter, Change.NONE)
        scales = decode(self.raw(beside, 0, 1), tensor.block)[0]
        if not is_finite(scales):
            raise self.error(tensor.name, "holds NaN or infinity")
        return float(scales[row // entry.shape[1] if num_scales > 1 else 0])

    def raw_chunks(self, entry: Entry, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, bytes) over rows [start, end), a few million numbers at a time."""
        step = max(1, _CHUNK_ITEMS // entry.shape[-1])
        for first in range(start, end, step):
            yield first, self.raw(entry, first, min(first + step, end))

    def chunks(self, entry: Entry, start: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 rows as the file has them) over rows [start, end)."""
        scale = self.scale(entry, start)
        for first, raw_RB in self.raw_chunks(entry, start, end):
            x_RI = decode(raw_RB, self.file.tensors[entry.name].block) * scale
            if not is_finite(x_RI):
                raise self.error(entry.name, "holds NaN or infinity")
            yield first, x_RI


def _matrix_dtype(file: GgufFile, entries: list[Entry]) -> torch.dtype:
    kinds = {file.tensors[entry.name].block.name for entry in entries if not entry.is_float32}
    if kinds <= {"F32", "F64"}:
        return torch.float32
    return torch.float16 if kinds == {"F16"} else torch.bfloat16


def _stays_fine(reader: _Rows, entry: Entry, dtype: torch.dtype) -> bool:
    """Whether a small matrix that the file keeps in fp32 holds numbers that `dtype` has not."""
    is_kept = entry.is_float32 or entry.name.endswith(_ALSO_FINE)
    if len(entry.shape) == 1 or not is_kept or reader.file.tensors[entry.name].block.name != "F32":
        return False
    rows = (0, matrix_shape(entry.shape)[0])
    return not all(torch.equal(x_RI.to(dtype).to(torch.float32), x_RI) for _, x_RI in reader.chunks(entry, *rows))


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
    reader: _Rows,
    config: ModelConfig,
    entries: list[Entry],
    vectors: Mapping[str, Tensor],
    packed: Mapping[str, BlockType],
    dtypes: Mapping[str, torch.dtype],
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
            if name in packed:
                yield from _packed(reader, part.name.removesuffix(".weight"), part.shape, places[part.name])
            else:
                yield part.name, _assembled(reader, part.shape, places[part.name], dtypes[name])


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


def _packed(
    reader: _Rows, module: str, shape: tuple[int, ...], places: list[tuple[Entry, Slab]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed weight, as qnext.quant.formats lays them out."""
    num_rows, num_inputs = shape
    block = reader.file.tensors[places[0][0].name].block
    bits = KEPT_BITS[block.name]
    words_RW = torch.empty(num_rows, packed_width(num_inputs, bits=bits), dtype=torch.int32)
    scales_RN = torch.empty(num_rows, num_inputs // GROUP_SIZE, dtype=torch.float16)
    for entry, slab in places:
        for first, raw_RB in reader.raw_chunks(entry, *slab.rows):
            codes_RI, scales = integer_codes(raw_RB, block)
            if not is_finite(scales):
                raise reader.error(entry.name, "holds NaN or infinity")
            start = slab.disk_rows[0] + first - slab.rows[0]
            words_RW[start : start + len(codes_RI)] = pack_words(codes_RI, bits=bits)
            scales_RN[start : start + len(codes_RI)] = scales
    yield f"{module}.weight_packed", words_RW
    yield f"{module}.weight_scale", scales_RN
    yield f"{module}.weight_shape", torch.tensor(shape, dtype=torch.int64)
