"""Packed folders whose config.json says something else, or too much, or whose parts differ: the tensors decide."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.checkpoint.files import TensorFiles
from qnext.errors import CorruptCheckpoint, QnextWarning

from .folders import edit_config, rewrite
from .packed_folders import (
    FORMS,
    PackedForm,
    assert_holds,
    pack,
    packed_folder,
    quantization_config,
    random_codes,
    weights_of,
)

GROUPED, AWQ, GPTQ = FORMS[0], FORMS[6], FORMS[7]
DOWN = "model.layers.0.mlp.experts.1.down_proj"


def _weights(**changes: Any) -> dict[str, Any]:
    config = quantization_config(GROUPED)
    config["config_groups"]["group_0"]["weights"].update(changes)
    return config


def _gptq(**changes: Any) -> dict[str, Any]:
    return {**quantization_config(GPTQ), **changes}


# What config.json says differs from the tensors, or says too much; and what the warning tells, None for no warning.
READ_ALL_THE_SAME: dict[str, tuple[PackedForm, dict[str, Any] | None, str | None]] = {
    "everything ignored": (
        GROUPED,
        {**quantization_config(GROUPED), "ignore": ["re:.*"]},
        r"leaves \d+ weights \(the first is .*\) plain, stored as pack-quantized int4-g16",
    ),
    "split names where the folder has fused ones": (
        GROUPED,
        {**quantization_config(GROUPED), "ignore": ["lm_head", "mtp.fc", "re:.*gate$", "re:.*in_proj_(a|b)$"]},
        r"int4-g16 is asked for 3 weights \(the first is .*in_proj_ba\), stored plain",
    ),
    "awq declared as compressed-tensors": (AWQ, quantization_config(GROUPED), r"stored as awq int4-g16"),
    "words and no declaration": (GROUPED, None, r"config.json: leaves \d+ weights .*, stored as pack-quantized"),
    "unknown keys in one line": (
        GROUPED,
        {**_weights(flavour=1), "colour": 2},
        r"quantization_config: colour, .*flavour: not known here",
    ),
    "activation order within groups": (GROUPED, _weights(actorder="weight"), None),
    "no group size": (GPTQ, _gptq(group_size=None, bits=None), None),
    "dynamic that changes nothing": (
        GPTQ,
        _gptq(
            dynamic={
                "lm_head": {},
                "+:.*experts.*": {"bits": 4, "group_size": 16},
                **quantization_config(GPTQ)["dynamic"],
            }
        ),
        None,
    ),
    "modules of a block": (
        GPTQ,
        _gptq(modules_in_block_to_quantize=[["mlp.experts.0.gate_proj"]]),
        r"leaves \d+ weights .*plain",
    ),
    "blocks": (GPTQ, _gptq(block_name_to_quantize="model.layers"), None),
    "kv cache": (
        GROUPED,
        {**quantization_config(GROUPED), "kv_cache_scheme": {"num_bits": 8}},
        r"the cache is kept finer",
    ),
    "activations": (
        GROUPED,
        {
            **quantization_config(GROUPED),
            "config_groups": {
                "group_0": {
                    **quantization_config(GROUPED)["config_groups"]["group_0"],
                    "input_activations": {"num_bits": 8, "dynamic": False},
                    "output_activations": {"num_bits": 8},
                }
            },
        },
        None,
    ),
    "dense beside packed": (
        GROUPED,
        {**quantization_config(GROUPED), "format": "dense", "sparsity_config": {"format": "dense"}},
        r"leaves \d+ weights",
    ),
    "mixed": (GROUPED, {**quantization_config(GROUPED), "format": "mixed-precision"}, None),
    "a method of another spelling": (GPTQ, _gptq(quant_method="GPTQModel"), None),
}


@pytest.mark.parametrize("name", READ_ALL_THE_SAME)
def test_the_tensors_are_the_last_word(tmp_path: Path, name: str) -> None:
    form, config, message = READ_ALL_THE_SAME[name]
    folder = tmp_path / "m"
    expected = packed_folder(folder, form)
    edit_config(folder, quantization_config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_holds(load_model(folder, dtype=torch.float32), expected)
    told = [str(each.message) for each in caught if each.category is QnextWarning]
    if message is None:
        assert told == []
    else:
        assert any(re.search(message, line) for line in told), told
        assert all("\n" not in line for line in told)


def test_activation_order_is_read(tmp_path: Path) -> None:
    """Each input finds its group by the index: numbers are exact, and what is in order keeps its codes."""
    folder = tmp_path / "m"
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    index = torch.arange(32)[order] // 16
    keys = [f"model.layers.0.mlp.experts.{expert}.down_proj" for expert in range(3)]
    expected = packed_folder(folder, GPTQ, change=lambda t: t.update({f"{key}.g_idx": index.int() for key in keys}))
    with TensorFiles(folder) as files:
        for key in keys:
            words = files.read(f"{key}.qweight").T
            codes = ((words[..., None] >> (4 * torch.arange(8))) & 15).flatten(1)
            scales = files.read(f"{key}.scales").float().T
            expected[f"{key}.weight"] = (codes - 8).float() * scales[:, index]
    with pytest.warns(
        QnextWarning, match=r"m: model.layers.0.mlp.experts.down_proj: numbers instead of codes in memory"
    ):
        model = load_model(folder, dtype=torch.float32)
    assert_holds(model, expected)
    weights = weights_of(model)
    assert isinstance(weights["model.layers.0.mlp.experts.down_proj"], Tensor)
    assert not isinstance(weights["model.layers.1.mlp.experts.down_proj"], Tensor)


MIXED: dict[str, tuple[PackedForm, Any]] = {
    "an expert that is plain": (AWQ, lambda t, w: _replace(t, {f"{DOWN}.weight": w.bfloat16()})),
    "an expert of other bits": (GROUPED, lambda t, w: _replace(t, _pack_again(w, FORMS[2]))),
    "an expert of other scales": (
        GROUPED,
        lambda t, w: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].float()}),
    ),
    "an expert of bytes": (GROUPED, lambda t, w: _replace(t, _pack_again(w, FORMS[4]))),
}


def _replace(tensors: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{DOWN}.")]:
        del tensors[key]
    tensors.update(new)


def _pack_again(weight: Tensor, form: PackedForm) -> dict[str, Tensor]:
    codes = random_codes(weight.shape, form, scale_dtype=torch.float16, seed=99)
    return pack(DOWN, codes, form)


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
@pytest.mark.parametrize("name", MIXED)
def test_experts_of_different_forms_become_numbers(tmp_path: Path, name: str) -> None:
    form, change = MIXED[name]
    folder = tmp_path / "m"
    expected = packed_folder(folder, form)
    config = quantization_config(form)
    if "bits" in name or "bytes" in name:
        other = FORMS[4] if "bytes" in name else FORMS[2]
        expected[f"{DOWN}.weight"] = random_codes(
            torch.Size((48, 32)), other, scale_dtype=torch.float16, seed=99
        ).dequantize()
        group = quantization_config(other)["config_groups"]["group_0"]
        config["config_groups"]["group_1"] = {**group, "targets": [DOWN], "format": other.layout}
    elif "plain" in name:
        expected[f"{DOWN}.weight"] = expected[f"{DOWN}.weight"].bfloat16().float()
    rewrite(folder, lambda t: change(t, expected[f"{DOWN}.weight"]))
    edit_config(folder, quantization_config=config)
    model = load_model(folder, dtype=torch.float32)
    assert_holds(model, expected)
    assert isinstance(weights_of(model)["model.layers.0.mlp.experts.down_proj"], Tensor)


BESIDE: dict[str, tuple[PackedForm, dict[str, Tensor]]] = {
    "a bias of zeros": (GPTQ, {f"{DOWN}.bias": torch.zeros(48, dtype=torch.float16)}),
    "an index that was never written": (GROUPED, {f"{DOWN}.weight_g_idx": torch.full((32,), -1)}),
    "an index in order": (GROUPED, {f"{DOWN}.weight_g_idx": torch.arange(32) // 16}),
    "scales of the cache": (GROUPED, {"model.layers.3.self_attn.k_scale": torch.ones(1)}),
    "scales of the cache at their projection": (GPTQ, {"model.layers.3.self_attn.v_proj.output_scale": torch.ones(1)}),
    "scales of the cache in a module of their own": (AWQ, {"model.layers.3.self_attn.attn.k_scale": torch.ones(1)}),
    "zeros of a symmetric form": (GROUPED, {f"{DOWN}.weight_zero_point": torch.zeros(48, 2, dtype=torch.int8)}),
    "zeros of the other format": (GPTQ, {f"{DOWN}.qzeros": torch.full((2, 6), 0x88888888 - 2**32, dtype=torch.int32)}),
}


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
@pytest.mark.parametrize("name", BESIDE)
def test_tensors_beside_that_change_nothing(tmp_path: Path, name: str) -> None:
    form, tensors = BESIDE[name]
    expected = packed_folder(tmp_path / "m", form, change=lambda t: t.update(tensors))
    model = load_model(tmp_path / "m", dtype=torch.float32)
    assert_holds(model, expected)
    assert not isinstance(weights_of(model)["model.layers.0.mlp.experts.down_proj"], Tensor)


def test_a_bias_that_is_one(tmp_path: Path) -> None:
    packed_folder(tmp_path / "m", GPTQ, change=lambda t: t.update({f"{DOWN}.bias": torch.ones(48)}))
    with pytest.raises(CorruptCheckpoint, match=r"down_proj.bias is a bias, but config.json describes none"):
        load_model(tmp_path / "m")


def test_an_index_of_compressed_tensors(tmp_path: Path) -> None:
    """actorder "group": the same rule as GPTQ's desc_act."""
    index = torch.randperm(32, generator=torch.Generator().manual_seed(3)) // 16
    expected = packed_folder(
        tmp_path / "m", GROUPED, change=lambda t: t.update({f"{DOWN}.weight_g_idx": index.to(torch.int32)})
    )
    edit_config(tmp_path / "m", quantization_config=_weights(actorder="group"))
    with TensorFiles(tmp_path / "m") as files:
        words, scales = files.read(f"{DOWN}.weight_packed"), files.read(f"{DOWN}.weight_scale").float()
        codes = ((words[..., None] >> (4 * torch.arange(8))) & 15).flatten(1)
        expected[f"{DOWN}.weight"] = (codes - 8).float() * scales[:, index]
    with pytest.warns(QnextWarning, match="activation order"):
        assert_holds(load_model(tmp_path / "m", dtype=torch.float32), expected)
