"""Folders of few-bit floats and of bitsandbytes: the numbers that were packed, and faults by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import Capture, run
from torch import Tensor

from qnext import ops
from qnext.checkpoint import load_model
from qnext.checkpoint.gguf import export_gguf, import_gguf
from qnext.checkpoint.names import disk_parts
from qnext.diagnostics.folder import examine
from qnext.errors import CorruptCheckpoint, NotSupported, QnextWarning
from qnext.model import named_weights
from qnext.planning import list_parameters

from .float_folders import FLOAT_CONFIG, FloatForm, float_folder, float_forms, fp8
from .folders import edit_config
from .packed_folders import assert_holds, weights_of

FORMS = float_forms()
DOWN = "model.layers.0.mlp.experts.1.down_proj"
ROW = "model.layers.1.mlp.shared_expert.up_proj"

pytestmark = pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_numbers_that_were_packed(tmp_path: Path, name: str) -> None:
    expected = float_folder(tmp_path / "m", FORMS[name])
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


@pytest.mark.parametrize("name", ["official", "NVFP4", "nf4, nested", "MXFP4"])
def test_numbers_are_rounded_once_to_bfloat16(tmp_path: Path, name: str) -> None:
    expected = float_folder(tmp_path / "m", FORMS[name])
    model = load_model(tmp_path / "m")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_holds(model, {key: weight.bfloat16().float() for key, weight in expected.items()})


@pytest.mark.parametrize("name", FORMS)
def test_inspect_names_the_form(tmp_path: Path, capsys: Capture, name: str) -> None:
    expected = float_folder(tmp_path / "m", FORMS[name])
    result = run(capsys, "inspect", tmp_path / "m", "--json")
    assert result.code == 0
    packed = json.loads(result.out)["packed"]
    assert sum(packed.values()) == sum(weight.numel() for weight in expected.values())
    assert all(form.startswith(FORMS[name].shown) for form in packed), packed


@pytest.mark.parametrize("name", ["int8", "W8A8, one scale"])
def test_integers_stay_codes(tmp_path: Path, name: str) -> None:
    float_folder(tmp_path / "m", FORMS[name])
    weights = weights_of(load_model(tmp_path / "m"))
    assert not isinstance(weights["model.layers.0.mlp.experts.down_proj"], Tensor)
    assert isinstance(weights["model.layers.0.mlp.gate.weight"], Tensor)


@pytest.mark.parametrize("name", [name for name in FORMS if "FP8" in name or "official" in name or name == "E5M2"])
def test_fp8_stays_fp8_where_kernels_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In blocks, where no part of a parameter begins inside one. All numbers are those that were packed, or these
    rounded to bfloat16."""
    monkeypatch.setattr(ops, "reads_fp8", lambda device: True)
    expected = float_folder(tmp_path / "m", FORMS[name])
    model = load_model(tmp_path / "m")
    kept = {key: weight for key, weight in named_weights(model) if isinstance(weight, ops.Fp8Weight)}
    shown = FORMS[name].shown
    assert bool(kept) == ("x" in shown.partition(" ")[2] or " g" in shown), shown
    parts = {part.name: key for key, info in list_parameters(model.config).items() for part in disk_parts(info)}
    assert_holds(model, {n: w if parts[n] in kept else w.bfloat16().float() for n, w in expected.items()})
    assert not dict(named_weights(load_model(tmp_path / "m", dtype=torch.float32)))


def test_a_row_inside_a_block_is_refused() -> None:
    whole = ops.empty_fp8((2, 64, 32), block=(32, 16), scale_dtype=torch.float32)
    part = ops.Fp8Weight(torch.zeros(16, 32).to(torch.float8_e4m3fn), torch.ones(1, 2), (32, 16))
    ops.write_quantized(whole, part, expert=1, row=32)
    assert whole.scales[1, 1].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="row 16 is inside a block of 32 outputs"):
        ops.write_quantized(whole, part, expert=1, row=16)
    with pytest.raises(ValueError, match="only be part of one with the same blocks"):
        ops.write_quantized(whole, ops.Fp8Weight(part.codes, torch.ones(1, 1), (32, 32)), expert=1)


@pytest.mark.filterwarnings("error::qnext.errors.QnextWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("official", "official, other blocks", "fbgemm", "FP8-dynamic", "FP8-block", "MXFP8", "MXFP4"),
        *("nf4", "int8", "W8A8, one scale", "ModelOpt FP8", "NVFP4"),
    ],
)
def test_a_usual_folder_is_read_without_a_word(tmp_path: Path, name: str) -> None:
    float_folder(tmp_path / "m", FORMS[name])
    load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FP8 without a word", "config.json: leaves .* stored as fp8 ch"),
    ],
)
def test_what_differs_is_told(tmp_path: Path, name: str, message: str) -> None:
    float_folder(tmp_path / "m", FORMS[name])
    with pytest.warns(QnextWarning, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ModelOpt FP8", "tensors like .*input_scale are ignored: activations and the cache are kept finer"),
        ("NVFP4", "input_global_scale are ignored"),
        ("W8A8, one scale", "input_scale are ignored"),
    ],
)
def test_scales_of_activations_are_told_by_verify(tmp_path: Path, name: str, message: str) -> None:
    float_folder(tmp_path / "m", FORMS[name])
    found = [str(warning) for warning in examine(tmp_path / "m").warnings]
    assert sum(re.search(message, line) is not None for line in found) == 1


LABELS: dict[str, dict[str, Any]] = {
    "NVFP4 of compressed-tensors": FORMS["NVFP4"].config or {},
    "ModelOpt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "the official form": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
}


@pytest.mark.parametrize("label", LABELS)
def test_a_wrong_label_on_tensors_that_say_what_they_are(tmp_path: Path, label: str) -> None:
    expected = float_folder(tmp_path / "m", FORMS["FP8-dynamic"])
    edit_config(tmp_path / "m", quantization_config=LABELS[label])
    with pytest.warns(QnextWarning, match=r"is asked for \d+ weights .*, stored as fp8 channel; read as the tensors"):
        assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


def test_forms_by_module(tmp_path: Path) -> None:
    """Experts in NVFP4, the rest in FP8, one expert plain: format mixed-precision, or ModelOpt's MIXED_PRECISION."""

    def pack(weight: Tensor) -> Any:
        form = "NVFP4" if weight.shape[1] == FLOAT_CONFIG.moe_intermediate_size else "FP8-dynamic"
        return FORMS[form].pack(weight)

    config = dict(FORMS["FP8-dynamic"].config or {}, format="mixed-precision")
    groups = {
        f"group_{i}": dict((FORMS[name].config or {})["config_groups"]["group_0"])
        for i, name in enumerate(("NVFP4", "FP8-dynamic"))
    }
    groups["group_0"] |= {"targets": [r"re:.*down_proj$"], "format": "nvfp4-pack-quantized"}
    groups["group_1"] |= {"format": "float-quantized"}
    expected = float_folder(tmp_path / "m", FloatForm(pack, {**config, "config_groups": groups}, ""))
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)
    edit_config(tmp_path / "m", quantization_config={"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"})
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)


SIDE_FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ModelOpt": (
        "ModelOpt NVFP4",
        "hf_quant_config.json",
        {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "NVFP4",
                "kv_cache_quant_algo": "FP8",
                "group_size": 16,
                "exclude_modules": ["lm_head"],
            },
        },
    ),
    "ModelOpt FP8": (
        "ModelOpt FP8",
        "hf_quant_config.json",
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}},
    ),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_file_beside_config(tmp_path: Path, name: str) -> None:
    form, file, values = SIDE_FILES[name]
    expected = float_folder(tmp_path / "m", FORMS[form]._replace(config=None))
    (tmp_path / "m" / file).write_text(json.dumps(values))
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)
    values["quantization"]["quant_algo"] = "W4A8_AWQ"
    (tmp_path / "m" / file).write_text(json.dumps(values))
    with pytest.raises(NotSupported, match=rf"{file}: quantization.quant_algo: 'W4A8_AWQ' is not supported"):
        load_model(tmp_path / "m")


def _set(key: str, change: Any) -> Any:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[key] = change(tensors[key].clone())

    return apply


def _filled(value: float) -> Any:
    return lambda tensor: tensor.fill_(value)


def _first_byte(value: int) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1).view(torch.uint8)[0] = value
        return tensor

    return change


def _state(**changes: Any) -> Any:
    def change(tensor: Tensor) -> Tensor:
        state = {**json.loads(bytes(tensor.tolist())), **changes}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


STATE = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
DAMAGES: dict[str, tuple[str, Any, str]] = {
    "NaN code": ("official", _set(f"{DOWN}.weight", _first_byte(0x7F)), "down_proj.weight holds NaN or infinity"),
    "E5M2 infinity": ("E5M2", _set(f"{DOWN}.weight", _first_byte(0x7C)), "down_proj.weight holds NaN or infinity"),
    "NaN power": ("MXFP4", _set(f"{DOWN}.weight_scale", _first_byte(255)), "weight_scale holds NaN or infinity"),
    "power too large": ("MXFP4", _set(f"{DOWN}.weight_scale", _first_byte(254)), "a scale beyond what MXFP4 weights"),
    "NaN FP8 scale": ("NVFP4", _set(f"{DOWN}.weight_scale", _first_byte(0x7F)), "weight_scale holds NaN or infinity"),
    "global scale of zero": ("NVFP4", _set(f"{DOWN}.weight_global_scale", _filled(0.0)), "is not positive|beyond"),
    "global scale NaN": ("ModelOpt NVFP4", _set(f"{DOWN}.weight_scale_2", _filled(float("nan"))), "NaN|beyond"),
    "no global scale": ("NVFP4", lambda t: t.pop(f"{DOWN}.weight_global_scale"), "weight_global_scale is missing"),
    "no second scale": ("ModelOpt NVFP4", lambda t: t.pop(f"{DOWN}.weight_scale_2"), "weight_scale_2 is missing"),
    "no scale": ("FP8-dynamic", lambda t: t.pop(f"{DOWN}.weight_scale"), "is F8_E4M3, but its scales .* are missing"),
    "other grid": ("FP8-block", _set(f"{ROW}.weight_scale", lambda s: s.repeat(3, 1)), "its weight asks for"),
    "half the codes": ("NVFP4", _set(f"{DOWN}.weight_packed", lambda w: w[:, ::2].contiguous()), "asks for"),
    "bnb blocks": ("nf4", _set(STATE, _state(blocksize=128)), r"quant_state\S+ asks for \d+ blocks"),
    "bnb shape": ("nf4", _set(STATE, _state(shape=[32, 160])), r"says \[32, 160\], config.json asks for \[160, 32\]"),
    "bnb odd block": ("nf4", _set(STATE, _state(blocksize=63)), "gives no usable block sizes"),
    "bnb no JSON": ("nf4", _set(STATE, lambda t: t.flip(0)), "is no JSON object"),
    "bnb no state": ("nf4", lambda t: t.pop(STATE), "bitsandbytes__nf4 is missing"),
    "bnb nested gone": ("nf4, nested", lambda t: t.pop(f"{DOWN}.weight.nested_absmax"), "nested_absmax is missing"),
    "bnb order": ("int8", _set(f"{DOWN}.weight_format", _filled(1)), "weight_format asks for an order"),
    "bytes without scales": ("int8", lambda t: t.pop(f"{DOWN}.SCB"), "has dtype I8, which is no weight"),
    "FP8 norm": (
        "FP8-dynamic",
        _set("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "is F8_E4M3, but no matrix",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    form, change, message = DAMAGES[name]
    float_folder(tmp_path / "m", FORMS[form], change=change)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m") in str(caught.value)


def test_inputs_that_are_scaled_are_not_supported(tmp_path: Path) -> None:
    float_folder(
        tmp_path / "m", FORMS["ModelOpt NVFP4"], change=lambda t: t.update({f"{DOWN}.pre_quant_scale": torch.ones(32)})
    )
    with pytest.raises(NotSupported, match=r"down_proj.pre_quant_scale scales the inputs of"):
        load_model(tmp_path / "m")


def test_verify_reads_the_values(tmp_path: Path, capsys: Capture) -> None:
    """Beside the damage there is one line for the tokenizer, which the folder has not."""
    folder = tmp_path / "m"
    float_folder(folder, FORMS["NVFP4"])
    assert len(json.loads(run(capsys, "verify", folder, "--json").out)["problems"]) == 1
    shutil.rmtree(folder)
    float_folder(folder, FORMS["NVFP4"], change=lambda t: t.pop(f"{DOWN}.weight_global_scale"))
    result = run(capsys, "verify", folder, "--json")
    assert result.code == 5
    assert "weight_global_scale is missing" in result.out


@pytest.mark.parametrize("name", ["NVFP4", "nf4, nested", "FP8 without a word"])
def test_floats_can_be_quantised(tmp_path: Path, capsys: Capture, name: str) -> None:
    folder, out = tmp_path / "m", tmp_path / "out"
    expected = float_folder(folder, FORMS[name])
    result = run(capsys, "quantize", folder, out, "--scheme", "int8")
    assert result.code == 0, result.err
    weights = weights_of(load_model(out, dtype=torch.float32))
    values = ops.dequantize(weights["model.layers.0.mlp.experts.down_proj"], torch.float32)[1]
    error = (values - expected[f"{DOWN}.weight"]).norm() / expected[f"{DOWN}.weight"].norm()
    assert 0 < error < 0.01


@pytest.mark.parametrize("name", ["official", "NVFP4", "nf4, nested", "int8", "W8A8, one scale"])
def test_forms_become_gguf_and_come_back(tmp_path: Path, name: str) -> None:
    """Floats by way of bfloat16, codes exactly."""
    expected = float_folder(tmp_path / "m", FORMS[name])
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="f32", tokenizer_keys={"tokenizer.ggml.model": "gpt2"})
    import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    if "int8" not in FORMS[name].shown:
        expected = {key: weight.bfloat16().float() for key, weight in expected.items()}
    assert_holds(
        load_model(tmp_path / "back", dtype=torch.float32),
        {key: weight for key, weight in expected.items() if not key.startswith("mtp.")},
    )


def test_an_fp8_embedding_is_read(tmp_path: Path) -> None:
    parts, values = fp8(torch.randn(FLOAT_CONFIG.vocab_size, FLOAT_CONFIG.hidden_size), rows=1)
    added = {f"model.embed_tokens.{key}": tensor for key, tensor in parts.items()}
    expected = float_folder(tmp_path / "m", FORMS["FP8-dynamic"], change=lambda t: t.update(added))
    expected["model.embed_tokens.weight"] = values
    assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)
    assert load_model(tmp_path / "m").model.embed_tokens.weight.dtype == torch.bfloat16
