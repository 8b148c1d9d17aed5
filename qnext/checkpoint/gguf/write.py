"""A model folder to a GGUF file, tensor by tensor.

Legend: R rows, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint.check import Layout, layout_of, structure_problems
from qnext.checkpoint.files import Progress, TensorFiles
from qnext.checkpoint.finite import is_finite
from qnext.checkpoint.formats.forms import Form
from qnext.checkpoint.gguf.block_types import BLOCK_TYPES, EXPORT_TYPES, BlockType
from qnext.checkpoint.gguf.blocks import encode, encode_codes
from qnext.checkpoint.gguf.container import GgufSpec, Value
from qnext.checkpoint.gguf.keys import config_to_keys
from qnext.checkpoint.gguf.names import Change, GgufEntry, gguf_entries, matrix_shape, slabs
from qnext.checkpoint.gguf.writer import GgufWriter, new_file
from qnext.checkpoint.packed_values import is_in_order, read_packed
from qnext.checkpoint.provenance import GGUF_KEY, Making, parent_of
from qnext.checkpoint.values import read_weight, tensor_value_problems
from qnext.errors import CorruptCheckpoint, UsageError
from qnext.ops import QuantizedWeight
from qnext.planning import Kind

_QUANTIZATION_VERSION = 2
_CHUNK_ITEMS = 1 << 22


@torch.no_grad()
def export_gguf(
    folder: str | Path | Layout,
    path: str | Path,
    *,
    kind: str,
    tokenizer_keys: Mapping[str, Value],
    progress: Progress | None = None,
) -> None:
    """Write the model in `folder` to a new file at `path`, which appears when it is complete.

    `kind` is one of EXPORT_TYPES. Small tensors (vectors, router, convolution) stay in fp32; with quantised kinds the b
    and a projections too. A matrix whose rows are no whole blocks is BF16. Packed symmetric weights keep their codes in
    quantised kinds. `tokenizer_keys` are those of the vocabulary (qnext.text.gguf). Raises UsageError for a model that
    llama.cpp cannot compute or a number beyond the range of `kind`, CorruptCheckpoint for a damaged folder.
    """
    name, file_type = EXPORT_TYPES[kind]
    layout = layout_of(folder).with_all_experts()
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)
    config = layout.config
    with TensorFiles(layout.index) as files:
        keys = config_to_keys(config)
        keys |= {"general.name": files.folder.resolve().name, "general.file_type": file_type}
        keys |= {"general.quantization_version": _QUANTIZATION_VERSION}
        keys |= dict(tokenizer_keys) | _provenance_keys(layout, kind)
        entries = gguf_entries(config)
        source = _FolderMatrices(files, layout)
        specs = {entry.name: GgufSpec(_block_type(source, entry, BLOCK_TYPES[name]), entry.shape) for entry in entries}
        total = sum(spec.num_bytes for spec in specs.values())
        done = 0
        with new_file(path) as file:
            writer = GgufWriter(file, keys, specs)
            for entry in entries:
                spec = specs[entry.name]
                writer.write(entry.name, _encoded(source, entry, spec.block))
                done += spec.num_bytes
                if progress is not None:
                    progress(done, total)
            writer.finish()


def _provenance_keys(layout: Layout, kind: str) -> dict[str, Value]:
    """Where the model comes from, as far as a file can say it of itself, and its licence where it is known."""
    document = Making("convert", {"to": "gguf", "type": kind}, [parent_of(layout)]).document()
    keys: dict[str, Value] = {GGUF_KEY: json.dumps(document)}
    name = document.get("licence", {}).get("name")
    return keys | ({"general.license": name} if name else {})


def _block_type(source: _FolderMatrices, entry: GgufEntry, wanted: BlockType) -> BlockType:
    if entry.is_float32:
        return BLOCK_TYPES["F32"]
    if wanted.num_items > 1:
        form = source.exact_form(next(slabs(source.config, entry)).disk_name)
        if form is not None:
            return wanted if form.code_bits == 4 else BLOCK_TYPES["Q8_0"]
        if entry.parameter.kind is Kind.DELTA_BA:
            return BLOCK_TYPES["F32"]
    head = Kind.EMBEDDING if source.config.tie_word_embeddings else Kind.HEAD
    if wanted.name == "Q4_0" and entry.parameter.kind is head:
        wanted = BLOCK_TYPES["Q8_0"]
    return wanted if entry.shape[-1] % wanted.num_items == 0 else BLOCK_TYPES["BF16"]


class _FolderMatrices:
    """Tensors of a folder as matrices. The last one is kept: its rows are asked for in turn."""

    def __init__(self, files: TensorFiles, layout: Layout) -> None:
        self.config = layout.config
        self._files = files
        self._layout = layout
        self._last: tuple[str, Tensor] | None = None
        self._last_codes: tuple[str, QuantizedWeight] | None = None

    def exact_form(self, name: str) -> Form | None:
        """The form of a packed weight that Q8_0 or Q4_0 can hold as it is: symmetric, groups of whole blocks."""
        packed = self._layout.packed.get(name)
        if packed is None or not packed.form.keeps_codes or not packed.form.is_symmetric:
            return None
        is_whole = packed.group_size % BLOCK_TYPES["Q8_0"].num_items == 0
        return packed.form if is_whole and is_in_order(packed, self._files) else None

    def matrix(self, name: str) -> Tensor:
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        self._last = self._last_codes = None
        self._check_packed(name)
        packed = self._layout.packed.get(name)
        if packed is None:
            tensor = self._files.read(name)
        else:
            dtype = torch.float32 if packed.form.keeps_codes else torch.bfloat16
            tensor = read_weight(self._layout, self._files, name, dtype=dtype)
        matrix_RI = tensor.reshape(matrix_shape(tuple(tensor.shape)))
        self._last = (name, matrix_RI)
        return matrix_RI

    def codes(self, name: str, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Codes, one to a byte, and fp32 scales of rows of a packed weight."""
        if self._last_codes is None or self._last_codes[0] != name:
            self._check_packed(name)
            self._last = self._last_codes = None
            self._last_codes = (name, read_packed(self._layout.packed[name], self._files))
        weight = self._last_codes[1]
        codes_RI = weight.codes[start:end]
        if weight.bits == 4:
            codes_RI = torch.stack((codes_RI & 15, codes_RI >> 4), dim=-1).flatten(-2)
        return codes_RI, weight.scales[start:end].to(torch.float32)

    def error(self, name: str, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._files.folder}: tensor {name} {problem}")

    def _check_packed(self, name: str) -> None:
        for stored in self._layout.stored_names(name) if name in self._layout.packed else ():
            for problem in tensor_value_problems(self._layout, self._files, self._files.tensors[stored]):
                raise CorruptCheckpoint(problem)


def _encoded(source: _FolderMatrices, entry: GgufEntry, block: BlockType) -> Iterator[memoryview]:
    num_rows = max(1, _CHUNK_ITEMS // entry.shape[-1])
    for slab in slabs(source.config, entry):
        form = source.exact_form(slab.disk_name) if block.num_items > 1 else None
        for start in range(slab.disk_rows[0], slab.disk_rows[1], num_rows):
            end = min(start + num_rows, slab.disk_rows[1])
            if form is not None:
                codes_RI, scale_RG = source.codes(slab.disk_name, start, end)
                raw_RB = encode_codes(codes_RI, scale_RG, block, bits=form.code_bits)
            else:
                raw_RB = encode(_floats(source, entry, slab.disk_name, start, end), block)
            if not _is_in_range(raw_RB, block):
                raise UsageError(f"tensor {slab.disk_name} holds numbers beyond the range of {block.name}")
            yield raw_RB.reshape(-1).numpy().data


def _floats(source: _FolderMatrices, entry: GgufEntry, disk_name: str, start: int, end: int) -> Tensor:
    """Rows [start, end) of a tensor of the folder in fp32, as the file has them."""
    matrix_RI = source.matrix(disk_name)
    if matrix_RI.shape[1] != entry.shape[-1]:
        matrix_RI = matrix_RI.reshape(-1, entry.shape[-1])
    x_RI = matrix_RI[start:end].to(torch.float32)
    if not is_finite(x_RI):
        raise source.error(disk_name, "holds NaN or infinity")
    x_RI = _changed(x_RI, entry.change)
    if not is_finite(x_RI) or (entry.change is Change.NEGATIVE_EXP and not x_RI.all()):
        raise source.error(disk_name, "holds numbers whose exponential is beyond the range of fp32")
    return x_RI


def _changed(x_RI: Tensor, change: Change) -> Tensor:
    if change is Change.PLUS_ONE:
        return x_RI + 1
    if change is Change.NEGATIVE_EXP:
        # through fp64: the nearest fp32 number, from which the logarithm finds back
        return x_RI.to(torch.float64).exp().neg().to(torch.float32)
    return x_RI


def _is_in_range(raw_RB: Tensor, block: BlockType) -> bool:
    """Whether no number, and no scale of a block, became infinite. bf16 can, from the very largest fp32."""
    if block.name in ("F16", "BF16"):
        return is_finite(raw_RB.view(torch.float16 if block.name == "F16" else torch.bfloat16))
    if block.num_items == 1:
        return True
    scales = raw_RB.unflatten(-1, (-1, block.num_bytes))[..., :2].contiguous().view(torch.float16)
    return is_finite(scales)
