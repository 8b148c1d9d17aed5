"""Where the tensors of a model folder lie in a GGUF file, in both directions. No torch.

Names and forms are those of llama.cpp's architectures qwen3, qwen3moe and qwen3next (conversion/qwen.py,
gguf-py/gguf/tensor_mapping.py). Beside the names four things differ from the folder: experts are stacked, gate apart
from up; in_proj_qkvz, which goes head by head, is cut into all q, all k, all v (attn_qkv) and all z (attn_gate);
zero-centred norms carry their 1; A_log is stored as -exp(A_log). The MTP layer is the block after the last.

A tensor is looked at as a matrix of rows [R, I]; a vector is one row.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from enum import Enum
from typing import NamedTuple

from qnext.checkpoint.names import disk_parts
from qnext.config import ModelConfig
from qnext.planning import parameter_shapes

_LAYER = re.compile(r"(?:model\.layers\.(\d+)|mtp\.layers\.0)\.(.+)")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MTP = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}
_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
_QKVZ, _GATE_UP, _DOWN = "linear_attn.in_proj_qkvz.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_QKV = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
_ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(?P<part>gate|up|down)\.(?P<expert>\d+)\.weight")
# Kept in fp32 whatever the rest is: llama.cpp multiplies by them in fp32, or its loader asks for it.
_FLOAT32 = re.compile(r".*(_norm\.weight|norm\.weight|ssm_a|ssm_dt\.bias|ssm_conv1d\.weight|ffn_gate_inp\w*\.weight)")

Rows = tuple[int, int]


class Change(Enum):
    """What was done to the numbers of a folder on their way into a GGUF file."""

    NONE = "none"
    PLUS_ONE = "plus one"
    NEGATIVE_EXP = "negative exponential"


class Entry(NamedTuple):
    """A tensor of a GGUF file and the parameter of the model that it belongs to.

    Where a tensor holds several parameters it has an entry for each: `first_row` is where that begins, and
    `whole_shape` that of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    change: Change
    first_row: int = 0
    whole_shape: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.whole_shape or self.shape

    @property
    def is_float32(self) -> bool:
        return len(self.shape) == 1 or _FLOAT32.fullmatch(self.name) is not None


class Slab(NamedTuple):
    """Rows that lie together both in a tensor of the folder and in one of the file."""

    disk_name: str
    disk_rows: Rows
    rows: Rows


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the family; the configuration must be one of those that `keys.refuse` lets pass."""
    if config.zero_centered_norm:
        return "qwen3next"
    return "qwen3moe" if config.num_experts else "qwen3"


def gguf_entries(config: ModelConfig, present: Container[str] = ()) -> list[Entry]:
    """All tensors of a file in the order of the folder.

    `present` are the names in a file that is read: some tools leave gate and up together (ffn_gate_up_exps), put q, k
    and v together (attn_qkv), leave in_proj_qkvz as it is (ssm_in) or the experts apart (ffn_up.0); where those names
    are present they are expected.
    """
    entries: list[Entry] = []
    for name, shape in parameter_shapes(config).items():
        entries += _entries_of(config, name, shape, present)
    return entries


def _entries_of(config: ModelConfig, name: str, shape: tuple[int, ...], present: Container[str]) -> Iterator[Entry]:
    change = Change.NONE
    if name.endswith("A_log"):
        change = Change.NEGATIVE_EXP
    elif config.zero_centered_norm and "norm" in name and not name.endswith("linear_attn.norm.weight"):
        change = Change.PLUS_ONE
    if name in _TOP:
        yield Entry(_TOP[name], shape, name, change)
        return
    match = _LAYER.fullmatch(name)
    if match is None:
        yield Entry(f"blk.{config.num_hidden_layers}.{_MTP[name]}", shape, name, change)
        return
    block = f"blk.{match[1] or config.num_hidden_layers}."
    part = match[2]
    if part == _QKVZ and block + "ssm_in.weight" not in present:
        qkv_rows = config.linear_conv_dim
        yield Entry(block + "attn_qkv.weight", (qkv_rows, shape[1]), name, change)
        yield Entry(block + "attn_gate.weight", (shape[0] - qkv_rows, shape[1]), name, change)
    elif part in _QKV and block + "attn_qkv.weight" in present:
        yield _part_of_qkv(config, part, Entry(block + "attn_qkv.weight", shape, name, change))
    elif part in (_GATE_UP, _DOWN) and block + "ffn_down.0.weight" in present:
        for expert in range(shape[0]):
            rows = shape[1] // 2 if part == _GATE_UP else shape[1]
            for kind in ("gate", "up") if part == _GATE_UP else ("down",):
                yield Entry(f"{block}ffn_{kind}.{expert}.weight", (rows, shape[2]), name, change)
    elif part == _GATE_UP and block + "ffn_gate_up_exps.weight" not in present:
        half = (shape[0], shape[1] // 2, shape[2])
        yield Entry(block + "ffn_gate_exps.weight", half, name, change)
        yield Entry(block + "ffn_up_exps.weight", half, name, change)
    else:
        second_norm = "post_attention_norm" if architecture(config) == "qwen3next" else "ffn_norm"
        names = _BLOCK | {
            "post_attention_layernorm.weight": f"{second_norm}.weight",
            _QKVZ: "ssm_in.weight",
            _GATE_UP: "ffn_gate_up_exps.weight",
        }
        if block + "ssm_dt" in present:  # as Ollama's converter called it
            names["linear_attn.dt_bias"] = "ssm_dt"
        # conv1d has a middle dimension of one in the folder
        kept = (shape[0], shape[2]) if part == "linear_attn.conv1d.weight" else shape
        yield Entry(block + names[part], kept, name, change)


def _part_of_qkv(config: ModelConfig, part: str, entry: Entry) -> Entry:
    """q, k or v inside attn_qkv: all of q, with its gate, then k, then v."""
    q_rows = config.num_attention_heads * config.head_dim * (2 if config.attention_output_gate else 1)
    rows = [q_rows, *[config.num_key_value_heads * config.head_dim] * 2]
    first = sum(rows[: _QKV.index(part)])
    return entry._replace(first_row=first, whole_shape=(sum(rows), entry.shape[1]))


def slabs(config: ModelConfig, entry: Entry) -> Iterator[Slab]:
    """The rows of a tensor of the file, in order, each with its place in the folder."""
    parameter = entry.parameter
    one_expert = _ONE_EXPERT.fullmatch(entry.name)
    if one_expert is not None and parameter.endswith((_GATE_UP, _DOWN)):
        experts = parameter.rpartition(".")[0]
        yield Slab(f"{experts}.{one_expert['expert']}.{one_expert['part']}_proj.weight", *[(0, entry.shape[0])] * 2)
    elif parameter.endswith((_GATE_UP, _DOWN)):
        yield from _expert_slabs(config, entry)
    elif parameter.endswith(_QKVZ) and not entry.name.endswith("ssm_in.weight"):
        yield from _qkvz_slabs(config, entry)
    else:
        num_rows = matrix_shape(entry.shape)[0]
        yield Slab(parameter, (0, num_rows), (entry.first_row, entry.first_row + num_rows))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[R, I] of a tensor: all leading dimensions together, a vector as one row."""
    num_rows = 1
    for size in shape[:-1]:
        num_rows *= size
    return num_rows, shape[-1]


def _expert_slabs(config: ModelConfig, entry: Entry) -> Iterator[Slab]:
    """Expert after expert; of a stacked gate_up_proj only the half that the file's name says, unless it is whole."""
    parameter_shape = (
        (config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        if entry.parameter.endswith(_GATE_UP)
        else entry.shape
    )
    position = 0
    for part in disk_parts(entry.parameter, parameter_shape):
        if "ffn_gate_exps" in entry.name and "gate_proj" not in part.name:
            continue
        if "ffn_up_exps" in entry.name and "up_proj" not in part.name:
            continue
        yield Slab(part.name, (0, part.shape[0]), (position, position + part.shape[0]))
        position += part.shape[0]


def _qkvz_slabs(config: ModelConfig, entry: Entry) -> Iterator[Slab]:
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
            yield Slab(entry.parameter, (start, start + sizes[part]), (position, position + sizes[part]))
            position += sizes[part]
