"""A model folder becomes a GGUF file, tensor by tensor.

Legend: R rows, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint.check import read_layout, structure_problems
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.gguf.blocks import encode
from qnext.checkpoint.gguf.container import BLOCK_TYPES, BlockType, GgufSpec, GgufWriter, Value, new_file
from qnext.checkpoint.gguf.keys import config_to_keys
from qnext.checkpoint.gguf.names import Change, Entry, gguf_entries, matrix_shape, slabs
from qnext.checkpoint.header import load_json
from qnext.checkpoint.names import scale_name
from qnext.checkpoint.values import dequantize, is_finite
from qnext.config import ModelConfig
from qnext.errors import CorruptCheckpoint, UsageError

# option -> block type of the matrices and the number of general.file_type (llama.h, enum llama_ftype)
EXPORT_TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_QUANTIZATION_VERSION = 2
_CHUNK_ITEMS = 1 << 22


@torch.no_grad()
def export_gguf(
    folder: str | Path,
    path: str | Path,
    *,
    kind: str,
    tokenizer_keys: Mapping[str, Value],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the model in `folder` to a new file at `path`, which appears when it is complete.

    `kind` is one of EXPORT_TYPES. Vectors, the router and the convolution stay in fp32 with every kind, the b and a
    projections too with the quantised ones; the head is Q8_0 with q4_0. A matrix whose rows are no whole number of
    blocks is stored as BF16. `tokenizer_keys` are those of the vocabulary (qnext.text.gguf). Memory stays near one
    tensor of the folder. Raises UsageError for a model that llama.cpp cannot compute or a number beyond the range of
    `kind`, CorruptCheckpoint for a damaged folder.
    """
    name, file_type = EXPORT_TYPES[kind]
    with TensorFiles(folder) as files:
        _refuse_packed(files.folder)
        layout = read_layout(files.folder, files.tensors)
        for problem in structure_problems(layout, files.tensors, files.folder):
            raise CorruptCheckpoint(problem)
        config = layout.config
        keys = config_to_keys(config)
        keys |= {"general.name": files.folder.resolve().name, "general.file_type": file_type}
        keys |= {"general.quantization_version": _QUANTIZATION_VERSION}
        keys |= dict(tokenizer_keys)
        entries = gguf_entries(config)
        specs = {entry.name: GgufSpec(_block_type(config, entry, BLOCK_TYPES[name]), entry.shape) for entry in entries}
        total = sum(spec.num_bytes for spec in specs.values())
        done = 0
        source = _Source(files)
        with new_file(path) as file:
            writer = GgufWriter(file, keys, specs)
            for entry in entries:
                spec = specs[entry.name]
                writer.write(entry.name, _encoded(source, config, entry, spec.block))
                done += spec.num_bytes
                if progress is not None:
                    progress(done, total)
            writer.finish()


def _refuse_packed(folder: Path) -> None:
    path = folder / "config.json"
    block = load_json(path.read_bytes(), path).get("quantization_config") if path.is_file() else None
    if isinstance(block, dict) and block.get("quant_method") != "fp8":
        raise UsageError(f"{folder}: is quantised already; export the original weights")


def _block_type(config: ModelConfig, entry: Entry, wanted: BlockType) -> BlockType:
    if entry.is_float32:
        return BLOCK_TYPES["F32"]
    if wanted.num_items > 1 and entry.name.endswith("ssm_ba.weight"):
        return BLOCK_TYPES["F32"]
    if wanted.name == "Q4_0" and entry.name == ("token_embd.weight" if config.tie_word_embeddings else "output.weight"):
        wanted = BLOCK_TYPES["Q8_0"]
    return wanted if entry.shape[-1] % wanted.num_items == 0 else BLOCK_TYPES["BF16"]


class _Source:
    """Tensors of a folder as matrices. The last FP8 one is kept dequantised, since its rows are asked for in turn."""

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._last: tuple[str, Tensor] | None = None

    def matrix(self, name: str) -> Tensor:
        tensor = self._files.read(name)
        if tensor.dtype == torch.float8_e4m3fn:
            if self._last is None or self._last[0] != name:
                scales = self._files.read(scale_name(name))
                self._last = (name, dequantize(tensor, scales, dtype=torch.bfloat16))
            tensor = self._last[1]
        return tensor.reshape(matrix_shape(tuple(tensor.shape)))

    def drop(self, name: str) -> None:
        self._files.drop(name)

    def error(self, name: str, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._files.tensors[name].file}: tensor {name} {problem}")


def _encoded(source: _Source, config: ModelConfig, entry: Entry, block: BlockType) -> Iterator[memoryview]:
    num_rows = max(1, _CHUNK_ITEMS // entry.shape[-1])
    for slab in slabs(config, entry):
        matrix_RI = source.matrix(slab.disk_name)
        if matrix_RI.shape[1] != entry.shape[-1]:
            matrix_RI = matrix_RI.reshape(-1, entry.shape[-1])
        for start in range(slab.disk_rows[0], slab.disk_rows[1], num_rows):
            x_RI = matrix_RI[start : min(start + num_rows, slab.disk_rows[1])].to(torch.float32)
            if not is_finite(x_RI):
                raise source.error(slab.disk_name, "holds NaN or infinity")
            x_RI = _changed(x_RI, entry.change)
            if not is_finite(x_RI) or (entry.change is Change.NEGATIVE_EXP and not x_RI.all()):
                raise source.error(slab.disk_name, "holds numbers whose exponential is beyond the range of fp32")
            raw_RB = encode(x_RI, block)
            if not _is_in_range(raw_RB, block):
                raise UsageError(f"tensor {slab.disk_name} holds numbers beyond the range of {block.name}")
            yield raw_RB.reshape(-1).numpy().data
        source.drop(slab.disk_name)


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
