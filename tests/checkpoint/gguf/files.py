"""Tiny models that GGUF can hold, and small files to damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from qnext.checkpoint.gguf.block_types import BLOCK_TYPES
from qnext.checkpoint.gguf.container import GgufSpec, Value
from qnext.checkpoint.gguf.writer import GgufWriter, new_file
from qnext.config import ModelConfig
from tests.checkpoint.folders import CONFIGS

_NEXT = replace(
    CONFIGS["next"],
    linear_value_head_dim=8,
    linear_num_value_heads=4,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    bos_token_id=2,
    eos_token_id=(5, 4),
    initializer_range=0.3,
)
GGUF_CONFIGS: dict[str, ModelConfig] = {
    "next": _NEXT,
    "next tied": replace(_NEXT, tie_word_embeddings=True, num_nextn_predict_layers=0),
    "next yarn": _NEXT.with_yarn(4.0),
    "moe": replace(CONFIGS["moe"], hidden_size=64, moe_intermediate_size=32),
    "dense": replace(CONFIGS["dense"], hidden_size=64, intermediate_size=96),
    "dense tied": replace(CONFIGS["dense"], tie_word_embeddings=True, eos_token_id=None),
}


class Raw(NamedTuple):
    """Bytes of a tensor of a type; `shape` is that of the numbers."""

    block: str
    shape: tuple[int, ...]
    data: np.ndarray


def small_file(path: Path) -> Path:
    """A sound file of several kinds of keys and tensors, written by the reference implementation."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint32("a.count", 7)
    writer.add_uint64("a.long", 2**40)
    writer.add_int8("a.small", -3)
    writer.add_float32("a.number", 0.5)
    writer.add_float64("a.precise", 0.1)
    writer.add_bool("a.truth", True)
    writer.add_string("a.text", "Grüße")
    writer.add_array("a.texts", ["x", "", "yz"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.truths", [True, False])
    rows = np.arange(3 * 64, dtype=np.float32).reshape(3, 64)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("matrix", gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0), raw_dtype=_Q8_0)
    writer.add_tensor("half", rows.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file whose types are all floats, by the reference's reader."""
    return {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(path).tensors}


def write_arrays(path: Path, keys: Mapping[str, Value], tensors: Mapping[str, np.ndarray | Raw]) -> Path:
    """A file with these tensors: arrays of fp32, or bytes of another type."""
    raw = {name: data if isinstance(data, Raw) else Raw("F32", data.shape, data) for name, data in tensors.items()}
    with new_file(path) as file:
        specs = {name: GgufSpec(BLOCK_TYPES[item.block], item.shape) for name, item in raw.items()}
        writer = GgufWriter(file, keys, specs)
        for name, item in raw.items():
            writer.write(name, [np.ascontiguousarray(item.data).tobytes()])
        writer.finish()
    return path


_Q8_0 = gguf.GGMLQuantizationType.Q8_0
