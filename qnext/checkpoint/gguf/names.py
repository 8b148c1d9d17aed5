"""Where the tensors of a model folder lie in a GGUF file, in both directions. No torch.

Names and forms are those of llama.cpp's architectures qwen3, qwen3moe and qwen3next (conversion/qwen.py,
gguf-py/gguf/tensor_mapping.py). Four things differ beside names: experts are stacked, gate apart from up; in_proj_qkvz
is cut into all q, k and v (attn_qkv) and all z (attn_gate); zero-centred norms carry their 1; A_log is stored as
-exp(A_log). The MTP layer is the block after the last. A tensor is a matrix of rows [R, I]; a vector is one row.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from enum import Enum
from typing import NamedTuple

from qnext.checkpoint.names import disk_parts
from qnext.config import ModelConfig
from qnext.planning import Kind, ParameterInfo, list_parameters
from qnext.planning.parameters import NORMS

_OUTSIDE = {
    Kind.EMBEDDING: "token_embd.weight",
    Kind.FINAL_NORM: "output_norm.weight",
    Kind.HEAD: "output.weight",
}
_BLOCK = {
    Kind.MTP_FC: "nextn.eh_proj.weight",
    Kind.MTP_EMBEDDING_NORM: "nextn.enorm.weight",
    Kind.MTP_HIDDEN_NORM: "nextn.hnorm.weight",
    Kind.MTP_NORM: "nextn.shared_head_norm.weight",
    Kind.INPUT_NORM: "attn_norm.weight",
    Kind.QUERY: "attn_q.weight",
    Kind.KEY: "attn_k.weight",
    Kind.VALUE: "attn_v.weight",
    Kind.ATTENTION_OUT: "attn_output.weight",
    Kind.QUERY_NORM: "attn_q_norm.weight",
    Kind.KEY_NORM: "attn_k_norm.weight",
    Kind.DELTA_QKVZ: "ssm_in.weight",
    Kind.DELTA_BA: "ssm_ba.weight",
    Kind.CONVOLUTION: "ssm_conv1d.weight",
    Kind.A_LOG: "ssm_a",
    Kind.DT_BIAS: "ssm_dt.bias",
    Kind.DELTA_NORM: "ssm_norm.weight",
    Kind.DELTA_OUT: "ssm_out.weight",
    Kind.MLP_GATE: "ffn_gate.weight",
    Kind.MLP_UP: "ffn_up.weight",
    Kind.MLP_DOWN: "ffn_down.weight",
    Kind.ROUTER: "ffn_gate_inp.weight",
    Kind.EXPERTS_GATE_UP: "ffn_gate_up_exps.weight",
    Kind.EXPERTS_DOWN: "ffn_down_exps.weight",
    Kind.SHARED_GATE: "ffn_gate_shexp.weight",
    Kind.SHARED_UP: "ffn_up_shexp.weight",
    Kind.SHARED_DOWN: "ffn_down_shexp.weight",
    Kind.SHARED_SCALE: "ffn_gate_inp_shexp.weight",
}
_QKV = (Kind.QUERY, Kind.KEY, Kind.VALUE)
_EXPERT_PARTS = {Kind.EXPERTS_GATE_UP: ("gate", "up"), Kind.EXPERTS_DOWN: ("down",)}
_ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(?P<part>gate|up|down)\.(?P<expert>\d+)\.weight")
# Kept in fp32 whatever the rest is: llama.cpp multiplies by them in fp32, or its loader asks for it.
_FLOAT32 = (Kind.CONVOLUTION, Kind.ROUTER, Kind.SHARED_SCALE)

RowRange = tuple[int, int]


class Change(Enum):
    """How the numbers of a folder change on their way into a GGUF file."""

    NONE = "none"
    PLUS_ONE = "plus one"
    NEGATIVE_EXP = "negative exponential"


class GgufEntry(NamedTuple):
    """A tensor of a GGUF file and the parameter of the model that it belongs to.

    A tensor that holds several parameters has an entry for each: `first_row` is the first row of this parameter, and
    `whole_shape` is the shape of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    parameter: ParameterInfo
    change: Change
    first_row: int = 0
    whole_shape: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.whole_shape or self.shape

    @property
    def is_float32(self) -> bool:
        return len(self.shape) == 1 or self.parameter.kind in _FLOAT32


class Slab(NamedTuple):
    """Rows that are contiguous both in a tensor of the folder and in one of the file."""

    disk_name: str
    disk_rows: RowRange
    rows: RowRange


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the family. The configuration must be one that `keys.refuse_unsupported` accepts."""
    if config.zero_centered_norm:
        return "qwen3next"
    return "qwen3moe" if config.num_experts else "qwen3"


def gguf_entries(config: ModelConfig, present: Container[str] = ()) -> list[GgufEntry]:
    """All tensors of a file in the order of the folder.

    `present` are the names in a file that is read. Some tools keep gate and up together (ffn_gate_up_exps), put q, k
    and v together (attn_qkv), keep in_proj_qkvz unchanged (ssm_in), or keep the experts separate (ffn_up.0). Where
    those names are present they are expected.
    """
    return [entry for info in list_parameters(config).values() for entry in _entries_of(config, info, present)]


def _entries_of(config: ModelConfig, info: ParameterInfo, present: Container[str]) -> Iterator[GgufEntry]:
    change = Change.NONE
    if info.kind is Kind.A_LOG:
        change = Change.NEGATIVE_EXP
    elif config.zero_centered_norm and info.kind in NORMS:
        change = Change.PLUS_ONE
    if info.layer is None:
        yield GgufEntry(_OUTSIDE[info.kind], info.shape, info, change)
        return
    block, shape = f"blk.{info.layer}.", info.shape
    if info.kind is Kind.DELTA_QKVZ and block + "ssm_in.weight" not in present:
        qkv_rows = config.linear_conv_dim
        yield GgufEntry(block + "attn_qkv.weight", (qkv_rows, shape[1]), info, change)
        yield GgufEntry(block + "attn_gate.weight", (shape[0] - qkv_rows, shape[1]), info, change)
    elif info.kind in _QKV and block + "attn_qkv.weight" in present:
        yield _part_of_qkv(config, GgufEntry(block + "attn_qkv.weight", shape, info, change))
    elif info.expert_axis is not None and block + "ffn_down.0.weight" in present:
        parts = _EXPERT_PARTS[info.kind]
        for expert in range(shape[0]):
            for part in parts:
                yield GgufEntry(f"{block}ffn_{part}.{expert}.weight", (shape[1] // len(parts), shape[2]), info, change)
    elif info.kind is Kind.EXPERTS_GATE_UP and block + "ffn_gate_up_exps.weight" not in present:
        half = (shape[0], shape[1] // 2, shape[2])
        yield GgufEntry(block + "ffn_gate_exps.weight", half, info, change)
        yield GgufEntry(block + "ffn_up_exps.weight", half, info, change)
    elif info.kind is Kind.POST_NORM:
        name = "post_attention_norm" if architecture(config) == "qwen3next" else "ffn_norm"
        yield GgufEntry(f"{block}{name}.weight", shape, info, change)
    elif info.kind is Kind.DT_BIAS and block + "ssm_dt" in present:  # as Ollama's converter called it
        yield GgufEntry(block + "ssm_dt", shape, info, change)
    else:
        # conv1d has a middle dimension of one in the folder
        kept = (shape[0], shape[2]) if info.kind is Kind.CONVOLUTION else shape
        yield GgufEntry(block + _BLOCK[info.kind], kept, info, change)


def _part_of_qkv(config: ModelConfig, entry: GgufEntry) -> GgufEntry:
    """q, k or v inside attn_qkv: all of q, with its gate, then k, then v."""
    q_rows = config.num_attention_heads * config.head_dim * (2 if config.attention_output_gate else 1)
    rows = [q_rows, *[config.num_key_value_heads * config.head_dim] * 2]
    first = sum(rows[: _QKV.index(entry.parameter.kind)])
    return entry._replace(first_row=first, whole_shape=(sum(rows), entry.shape[1]))


def slabs(config: ModelConfig, entry: GgufEntry) -> Iterator[Slab]:
    """The rows of a tensor of the file, in order, each range with its place in the folder."""
    info = entry.parameter
    one_expert = _ONE_EXPERT.fullmatch(entry.name)
    if one_expert is not None and info.expert_axis is not None:
        experts = info.name.rpartition(".")[0]
        yield Slab(f"{experts}.{one_expert['expert']}.{one_expert['part']}_proj.weight", *[(0, entry.shape[0])] * 2)
    elif info.expert_axis is not None:
        yield from _expert_slabs(entry)
    elif info.kind is Kind.DELTA_QKVZ and entry.shape != info.shape:
        yield from _qkvz_slabs(config, entry)
    else:
        num_rows = matrix_shape(entry.shape)[0]
        yield Slab(info.name, (0, num_rows), (entry.first_row, entry.first_row + num_rows))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[R, I] of a tensor: all leading dimensions together. A vector is one row."""
    num_rows = 1
    for size in shape[:-1]:
        num_rows *= size
    return num_rows, shape[-1]


def _expert_slabs(entry: GgufEntry) -> Iterator[Slab]:
    """Expert after expert; of a stacked gate_up_proj only the half that the file's name says, unless it is whole."""
    position = 0
    for part in disk_parts(entry.parameter):
        if "ffn_gate_exps" in entry.name and "gate_proj" not in part.name:
            continue
        if "ffn_up_exps" in entry.name and "up_proj" not in part.name:
            continue
        yield Slab(part.name, (0, part.shape[0]), (position, position + part.shape[0]))
        position += part.shape[0]


def _qkvz_slabs(config: ModelConfig, entry: GgufEntry) -> Iterator[Slab]:
    """in_proj_qkvz holds for each key head its q, its k, and the v and the z of the value heads that share it."""
    key_rows = config.linear_key_head_dim
    value_rows = config.linear_value_dim // config.linear_num_key_heads
    sizes = {"q": key_rows, "k": key_rows, "v": value_rows, "z": value_rows}
    starts = {"q": 0, "k": key_rows, "v": 2 * key_rows, "z": 2 * key_rows + value_rows}
    head_rows = 2 * key_rows + 2 * value_rows
    position = 0
    for part in "z" if entry.name.endswith("attn_gate.weight") else "qkv":
        for head in range(config.linear_num_key_heads):
            start = head * head_rows + starts[part]
            yield Slab(entry.parameter.name, (start, start + sizes[part]), (position, position + sizes[part]))
            position += sizes[part]
