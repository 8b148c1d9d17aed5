"""What configurations of GPTQ, AWQ, AutoRound and others say of each module, and what is named as not read."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import Capture, run

from qnext.checkpoint import load_model
from qnext.checkpoint.formats.forms import ALIASES, LAYOUTS, METHODS, NOT_READ, Form, Quantization
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.quantization import read_quantization
from qnext.config import preset
from qnext.errors import NotSupported, QnextWarning
from qnext.planning import list_parameters

from .folders import edit_config, tiny_folder
from .packed_folders import FORMS, assert_holds, packed_folder, quantization_config
from .written_configs import WRITTEN

AWQ, GPTQ, GPTQ_V2 = FORMS[6], FORMS[7], FORMS[9]
EXPERT = "model.layers.2.mlp.experts.3.up_proj"
CONFIG = replace(preset("80b-a3b"), layer_types=("full_attention",) * 3, num_experts=4, num_experts_per_tok=2)
PARAMETERS = {part.module: info for info in list_parameters(CONFIG).values() for part in disk_parts(info)}


def read(folder: Path, block: Any, **keys: Any) -> Quantization:
    """The declaration of a config.json that holds `block`, which must be free of warnings."""
    (folder / "config.json").write_text(json.dumps({"quantization_config": block, **keys}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", QnextWarning)
        found = read_quantization(folder)
    assert found is not None
    return found


def form_of(quantization: Quantization, module: str) -> Form | None:
    return quantization.claim(module, PARAMETERS[module]).form


def forms_of(quantization: Quantization, *modules: str) -> list[str | None]:
    forms = [form_of(quantization, module) for module in modules]
    return [None if form is None else form.describe() for form in forms]


GPTQ_BLOCK = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False}


def test_gptq_by_module(tmp_path: Path) -> None:
    """The first pattern that matches holds."""
    dynamic = {
        "-:.*mlp\\.gate$": {},
        "lm_head": {},
        "+:.*\\.2\\..*up_proj": {"bits": 8, "group_size": 32},
        ".*up_proj": {"sym": False},
        "+:.*experts.*": {"bits": 3},
    }
    found = read(tmp_path, {**GPTQ_BLOCK, "dynamic": dynamic})
    modules = ("model.layers.0.mlp.gate", EXPERT, EXPERT.replace("2", "1"), EXPERT.replace("up", "down"), "lm_head")
    assert forms_of(found, *modules) == [None, "gptq int8-g32", "gptq int4-g128", "gptq int3-g128", None]
    forms = [form_of(found, module) for module in modules[1:4]]
    assert [form is None or form.is_symmetric for form in forms] == [True, False, True]
    assert forms_of(found, "model.layers.0.self_attn.q_proj", "model.embed_tokens") == ["gptq int4-g128", None]


def test_gptq_names_what_is_packed(tmp_path: Path) -> None:
    found = read(tmp_path, {**GPTQ_BLOCK, "modules_in_block_to_quantize": [["mlp.experts.3.up_proj"], ["o_proj"]]})
    modules = (EXPERT, "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.q_proj")
    assert forms_of(found, *modules) == ["gptq int4-g128", "gptq int4-g128", None]
    found = read(tmp_path, {**GPTQ_BLOCK, "modules_in_block_to_quantize": ["self_attn.q_proj"]})
    assert forms_of(found, *modules) == [None, None, "gptq int4-g128"]


AUTO_ROUND = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
    "autoround_version": "0.10.0",
    "iters": 200,
    "seqlen": 2048,
    "batch_size": 8,
    "low_gpu_mem_usage": True,
    "enable_quanted_input": True,
    "nsamples": 512,
    "block_name_to_quantize": "model.layers",
}


def test_auto_round_by_module(tmp_path: Path) -> None:
    """Names before patterns, patterns anywhere in the name, 16 bits and more for plain."""
    extra = {
        ".*gate$": {"bits": 16, "data_type": "float"},
        EXPERT: {"bits": 8, "group_size": 32, "data_type": "int"},
        "experts\\.\\d+\\.up_proj": {"bits": 2},
        "model.layers.1.self_attn": {"bits": 16, "data_type": "fp"},
        "lm_head": {"bits": 8, "sym": False, "act_bits": 16},
    }
    found = read(tmp_path, {**AUTO_ROUND, "extra_config": extra})
    modules = (EXPERT, EXPERT.replace("2", "0"), EXPERT.replace("up", "down"), "model.layers.0.mlp.gate", "lm_head")
    assert forms_of(found, *modules) == [
        "gptq int8-g32",
        "gptq int2-g128",
        "gptq int4-g128",
        None,
        "gptq int8-g128",
    ]
    assert forms_of(found, "model.layers.1.self_attn.q_proj", "mtp.layers.0.self_attn.q_proj") == [None, None]


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "AutoRound", "intel/auto-round"])
@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptq", "gptq"),
        ("auto_gptq", "gptq"),
        (None, "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round:awq", "awq"),
        ("auto_round:llm_compressor", None),
        ("auto_round:fp8_static", None),
    ],
)
def test_auto_round_is_what_it_packs(tmp_path: Path, packing: str | None, layout: str | None, method: str) -> None:
    found = read(tmp_path, {**AUTO_ROUND, "packing_format": packing, "quant_method": method})
    form = form_of(found, EXPERT)
    assert (form and form.layout) == layout
    if layout == "awq":
        assert form == Form("awq", 4, 128, False)


PACKINGS = {
    "auto_round:auto_gptq": GPTQ,
    "auto_round:gptqmodel": GPTQ_V2,
    "auto_round": GPTQ_V2,
    "auto_round:auto_awq": AWQ,
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_auto_round_folders_are_read(tmp_path: Path, packing: str) -> None:
    form = PACKINGS[packing]
    expected = packed_folder(tmp_path / "m", form)
    block = {**AUTO_ROUND, "packing_format": packing, "group_size": form.group_size, "sym": form.is_symmetric}
    kept = {f"model.layers.{i}.mlp.shared_expert_gate": {"bits": 16, "data_type": "fp"} for i in range(4)}
    edit_config(tmp_path / "m", quantization_config={**block, "extra_config": {**kept, ".*in_proj_ba": {"bits": 16}}})
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


def test_auto_round_with_groups_of_compressed_tensors(tmp_path: Path) -> None:
    expected = packed_folder(tmp_path / "m", FORMS[0])
    block = {**quantization_config(FORMS[0]), "quant_method": "auto-round", "provider": "auto-round"}
    edit_config(tmp_path / "m", quantization_config={**block, "packing_format": "auto_round:llm_compressor"})
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


def test_a_module_of_a_form_of_its_own(tmp_path: Path) -> None:
    """One matrix in 8 bits and groups of 8 among those of 4 bits: both keep their codes."""
    from .packed_folders import PackedForm, pack, random_codes

    name = "model.layers.1.mlp.shared_expert.down_proj"
    other = PackedForm("gptq", "gptq", 8, 8, False)
    codes = random_codes(torch.Size((48, 16)), other, scale_dtype=torch.float16, seed=3)
    expected = packed_folder(tmp_path / "m", GPTQ, change=lambda t: t.update(pack(name, codes, other)))
    expected[f"{name}.weight"] = codes.dequantize()
    block = quantization_config(GPTQ)
    override = {r"+:.*\.1\.mlp\.shared_expert\.down_proj": {"bits": 8, "group_size": 8, "sym": False}}
    edit_config(tmp_path / "m", quantization_config={**block, "dynamic": {**override, **block["dynamic"]}})
    model = load_model(tmp_path / "m", dtype=torch.float32)
    assert_holds(model, expected)
    assert not isinstance(model.get_submodule(name).weight, torch.Tensor)


@pytest.mark.parametrize(
    "block",
    [
        {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "exllama", "modules_to_not_convert": None},
        {"quant_method": "AWQ", "bits": 4, "zero_point": True, "backend": "autoawq", "do_fuse": False},
    ],
)
def test_awq_as_it_is_written(tmp_path: Path, block: dict[str, Any]) -> None:
    expected = packed_folder(tmp_path / "m", AWQ)
    edit_config(tmp_path / "m", quantization_config=block)
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


OLD_FILES = {
    "quantization_config.json": (
        GPTQ,
        {
            "bits": 4,
            "data_type": "int",
            "group_size": 16,
            "sym": True,
            "iters": 0,
            "low_gpu_mem_usage": True,
            "autoround_version": "0.12.2",
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
        },
    ),
    "quantize_config.json": (GPTQ, {"bits": 4, "group_size": 16, "desc_act": False, "sym": True, "damp_percent": 0.1}),
    "quant_config.json": (AWQ, {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}),
}


@pytest.mark.parametrize("file", OLD_FILES)
def test_files_beside_config(tmp_path: Path, file: str) -> None:
    form, values = OLD_FILES[file]
    expected = packed_folder(tmp_path / "m", form)
    edit_config(tmp_path / "m", quantization_config=None)
    (tmp_path / "m" / file).write_text(json.dumps(values))
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_configurations_as_they_are_written_need_no_warning(tmp_path: Path, name: str) -> None:
    """Keys and values that these programs write."""
    read(tmp_path, WRITTEN[name])


@pytest.mark.parametrize("key", ["compression_config", "nested", "text_config"])
def test_keys_that_older_programs_wrote(tmp_path: Path, key: str) -> None:
    expected = packed_folder(tmp_path / "m", FORMS[0])
    block = quantization_config(FORMS[0])
    del block["quant_method"]
    if key == "nested":
        moved = {"compression_config": {"quantization_config": block, "sparsity_config": {}, "version": "0.5"}}
    else:
        moved = {key: {"quantization_config": block} if key == "text_config" else block}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(moved))
    assert read_quantization(tmp_path / "other").forms == (Form("pack-quantized", 4, 16),)  # type: ignore[union-attr]
    if key != "text_config":
        edit_config(tmp_path / "m", quantization_config=None, **moved)
        assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


@pytest.mark.parametrize("method", [*NOT_READ, "something-new"])
def test_methods_that_are_not_read(tmp_path: Path, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    with pytest.raises(NotSupported, match=f"'{method}' is not supported.*; read are fp8, .*gptq, awq") as caught:
        read_quantization(tmp_path)
    assert NOT_READ.get(method, "") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hqq", "mlx"])
def test_not_read_is_not_corrupt(tmp_path: Path, capsys: Capture, key: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    if key == "mlx":
        values = {"group_size": 64, "bits": 4}
        edit_config(folder, quantization=values, quantization_config=values)
    else:
        edit_config(folder, quantization_config={"quant_method": key})
    for verb in ("inspect", "verify"):
        result = run(capsys, verb, folder)
        assert result.code == 6, result.err
        assert f"'{key}' is not supported" in result.err


def test_tables_agree() -> None:
    assert not METHODS.keys() & NOT_READ.keys()
    assert set(ALIASES.values()) <= METHODS.keys()
    assert not ALIASES.keys() & (METHODS.keys() | NOT_READ.keys())
    assert {layout.kind for layout in LAYOUTS.values()} == {"int", "float"}
