"""Names against llama.cpp's own table, and the places of rows as a bijection."""

from __future__ import annotations

import gguf
import pytest

from qnext.checkpoint.gguf.names import Change, architecture, gguf_entries, matrix_shape, slabs
from qnext.checkpoint.names import expected_tensors
from qnext.config import ModelConfig

from .files import GGUF_CONFIGS

ARCHITECTURES = {
    "qwen3next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
# What the converter renames before it looks into its table (conversion/qwen.py).
MTP = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head.norm"}


def their_name(config: ModelConfig, parameter: str) -> str | None:
    """Name by the reference's table for a parameter of the model; None where it has no single one."""
    layer = config.num_hidden_layers
    name = parameter.replace("mtp.layers.0.", f"model.layers.{layer}.")
    if name.startswith("mtp."):
        name = f"model.layers.{layer}.{MTP[name.split('.')[1]]}.weight"
    name = name.replace(".dt_bias", ".dt_proj.bias")
    if name.endswith("experts.down_proj"):
        name += ".weight"
    kind = ARCHITECTURES[architecture(config)]
    if any(f".{part}." in name for part in MTP.values() if part != "norm"):
        kind = gguf.MODEL_ARCH.GLM4_MOE  # the released package lists MTP for this architecture only
    table = gguf.get_tensor_name_map(kind, layer + config.num_nextn_predict_layers)
    return table.get_name(name, (".weight", ".bias"))


@pytest.mark.parametrize("name", GGUF_CONFIGS)
def test_names_are_those_of_the_reference(name: str) -> None:
    config = GGUF_CONFIGS[name]
    split = ("attn_qkv", "attn_gate.", "ffn_gate_exps", "ffn_up_exps")
    entries = [entry for entry in gguf_entries(config) if not any(part in entry.name for part in split)]
    assert len(entries) > 10
    for entry in entries:
        assert entry.name == their_name(config, entry.parameter.name), entry
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[ARCHITECTURES[architecture(config)]]}
    known |= {pattern for pattern in gguf.TENSOR_NAMES.values() if ".nextn." in pattern}
    for entry in gguf_entries(config):
        base = entry.name.removesuffix(".weight").removesuffix(".bias")
        block = base.split(".")[1] if base.startswith("blk.") else ""
        assert any(base == pattern.replace("{bid}", block) for pattern in known), entry


@pytest.mark.parametrize("name", GGUF_CONFIGS)
@pytest.mark.parametrize("are_fused", [False, True])
def test_every_row_of_the_folder_has_one_place(name: str, are_fused: bool) -> None:
    config = GGUF_CONFIGS[name]
    blocks = range(config.num_hidden_layers + 1)
    fused = {f"blk.{i}.{part}.weight" for i in blocks for part in ("ffn_gate_up_exps", "ssm_in")} if are_fused else ()
    seen: dict[str, list[range]] = {}
    for entry in gguf_entries(config, fused):
        position = 0
        for slab in slabs(config, entry):
            assert slab.rows[0] == position, entry
            position = slab.rows[1]
            rows = range(*slab.disk_rows)
            assert len(rows) == slab.rows[1] - slab.rows[0] > 0
            seen.setdefault(slab.disk_name, []).append(rows)
        assert position == matrix_shape(entry.shape)[0]
    expected = expected_tensors(config)
    assert seen.keys() == expected.keys()
    for disk_name, ranges in seen.items():
        num_rows = sum(map(len, ranges))
        assert sorted(row for rows in ranges for row in rows) == list(range(num_rows))
        size = 1
        for length in expected[disk_name]:
            size *= length
        assert size % num_rows == 0


def test_which_numbers_change() -> None:
    changes: dict[Change, set[str]] = {change: set() for change in Change}
    for entry in gguf_entries(GGUF_CONFIGS["next"]):
        changes[entry.change].add(".".join(entry.parameter.name.split(".")[-2:]))
    assert changes[Change.NEGATIVE_EXP] == {"linear_attn.A_log"}
    assert changes[Change.PLUS_ONE] == {
        f"{name}.weight"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "q_norm",
            "k_norm",
            "norm",
            "pre_fc_norm_embedding",
            "pre_fc_norm_hidden",
        )
    }
    gated = [entry for entry in gguf_entries(GGUF_CONFIGS["next"]) if entry.name.endswith("ssm_norm.weight")]
    assert {entry.change for entry in gated} == {Change.NONE}
    assert {entry.change for entry in gguf_entries(GGUF_CONFIGS["moe"])} == {Change.NONE}


def test_in_proj_qkvz_is_cut_head_by_head() -> None:
    """Two key heads of 8 rows, each with two value heads of 8: a head is q 8, k 8, v 16, z 16."""
    config = GGUF_CONFIGS["next"]
    by_name = {entry.name: entry for entry in gguf_entries(config)}
    qkv = [slab.disk_rows for slab in slabs(config, by_name["blk.0.attn_qkv.weight"])]
    assert qkv == [(0, 8), (48, 56), (8, 16), (56, 64), (16, 32), (64, 80)]
    assert [slab.disk_rows for slab in slabs(config, by_name["blk.0.attn_gate.weight"])] == [(32, 48), (80, 96)]
