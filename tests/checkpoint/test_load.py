"""Loading gives what the folder holds, or says what is wrong with it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import create_folder, load_model, save_model
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.finite import is_finite
from qnext.errors import ConfigError, CorruptCheckpoint, ModelNotFound, QnextWarning, UsageError
from qnext.model import Batch, CausalLM, initialize
from tests.config.folder import read_config

from .folders import CONFIGS, edit_config, make_fp8, poke, rewrite, tiny_folder, tiny_model


def assert_same_weights(model: CausalLM, other: CausalLM) -> None:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_exported_is_imported_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    save_model(model, tmp_path / "m", max_shard_bytes=50_000)
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_loaded_model_computes(tmp_path: Path) -> None:
    """Also what is not in the file: rotary frequencies of a model that was built without storage."""
    model = tiny_model()
    save_model(model, tmp_path / "m")
    batch = Batch.from_lengths(torch.arange(70), [30, 40])
    assert torch.equal(load_model(tmp_path / "m")(batch).hidden_TD, model(batch).hidden_TD)


def test_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path / "m")
    assert_same_weights(load_model(tmp_path / "m", dtype=torch.bfloat16), model.to(torch.bfloat16))


def test_float16_overflow_is_not_silent(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    poke(folder, "model.norm.weight", torch.tensor(1e30))
    load_model(folder)
    with pytest.raises(UsageError, match=r"model.norm.weight holds numbers beyond the range of float16"):
        load_model(folder, dtype=torch.float16)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(tiny_folder(tmp_path / "m"), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]}


def _change_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(47)


def _transpose(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


DAMAGES = {
    "missing": (
        lambda t: t.pop("model.layers.1.linear_attn.A_log"),
        r"tensor model.layers.1.linear_attn.A_log is missing",
    ),
    "one expert missing": (
        lambda t: t.pop("model.layers.0.mlp.experts.4.up_proj.weight"),
        r"tensor model.layers.0.mlp.experts.4.up_proj.weight is missing",
    ),
    "surplus": (
        lambda t: t.update({"model.layers.9.input_layernorm.weight": torch.zeros(48)}),
        r"tensor model.layers.9.input_layernorm.weight is surplus",
    ),
    "one expert too many": (
        lambda t: t.update({"model.layers.0.mlp.experts.5.up_proj.weight": torch.zeros(20, 48)}),
        r"experts.5.up_proj.weight is surplus",
    ),
    "misshaped": (_change_shape, r"tensor model.norm.weight has shape \[47\], config.json asks for \[48\]"),
    "transposed": (_transpose, r"has shape \[20, 48\], config.json asks for \[48, 20\]"),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int32)}),
        r"tensor model.norm.weight has dtype I32, which is no weight",
    ),
    "fp8 without scales": (
        lambda t: t.update({"lm_head.weight": torch.zeros(300, 48).to(torch.float8_e4m3fn)}),
        r"lm_head.weight is F8_E4M3, but its scales lm_head.weight_scale_inv are missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    change, message = DAMAGES[name]
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "mtp.layers.0.mlp.experts.4.gate_proj.weight",
        "model.layers.2.linear_attn.dt_bias",
    ],
)
def test_values_must_be_finite(tmp_path: Path, name: str, value: float) -> None:
    folder = tiny_folder(tmp_path / "m")
    poke(folder, name, torch.tensor(value))
    with pytest.raises(CorruptCheckpoint, match=rf"model-0.*safetensors: tensor {name} holds NaN or infinity"):
        load_model(folder)
    load_model(folder, check_finite=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_is_finite_sees_every_place(dtype: torch.dtype) -> None:
    values = torch.linspace(-3, 3, 77).to(dtype)
    assert is_finite(values)
    for place in (0, 40, 76):
        wide = values.float()
        wide[place] = float("nan")
        assert not is_finite(wide.to(dtype))


def test_mtp_is_taken_from_the_tensors_where_the_config_is_silent(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    edit_config(folder, num_nextn_predict_layers=None)
    assert read_config(folder).num_nextn_predict_layers == 0
    assert load_model(folder).mtp is not None
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("mtp.")])
    assert load_model(folder).mtp is None


def test_rotary_leftovers_are_ignored(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, lambda t: t.update({"model.layers.3.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_same_weights(load_model(folder), tiny_model())


def test_a_written_tied_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    """As the reference: a head that was written beside the embedding and differs is the head."""
    folder = tiny_folder(tmp_path / "m", "next tied")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_weights(load_model(folder), tiny_model("next tied"))
    rewrite(folder, lambda t: t["lm_head.weight"][-1].neg_())
    with pytest.warns(QnextWarning, match=r"lm_head.weight differs from the embedding and is used"):
        model = load_model(folder)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight[-1], -model.model.embed_tokens.weight[-1])


def test_no_config(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config.json"):
        load_model(folder)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    """Two sizes of the model are beyond one block and no multiple of it, so that every border is met."""
    config = dataclasses.replace(CONFIGS["next"], hidden_size=150, num_attention_heads=10)
    model = CausalLM(config)
    initialize(model, seed=3)
    folder = tmp_path / "m"
    save_model(model, folder)
    expected = make_fp8(folder, scale_dtype=scale_dtype)
    loaded, in_fp32 = load_model(folder), load_model(folder, dtype=torch.float32)
    save_model(in_fp32, tmp_path / "back")
    with TensorFiles(tmp_path / "back") as files:
        assert expected.keys() < files.tensors.keys()
        assert any(max(weight.shape) > 256 for weight in expected.values())
        for name, weight in expected.items():
            assert torch.equal(files.read(name), weight), name
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_same_weights(loaded, in_fp32.to(torch.bfloat16))
    originals = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        # e4m3 has 3 bits behind the point: at most 1/16 of a number, and nothing below 2^-10 of the block's largest.
        torch.testing.assert_close(parameter.float(), originals[name], rtol=0.08, atol=2e-3 * 0.1)


FP8_DAMAGES = {
    "scales missing": (lambda t, n: t.pop(n), "its scales .* are missing"),
    "scales misshaped": (lambda t, n: t.update({n: t[n].T.repeat(2, 1)}), "its weight asks for"),
    "scales of doubles": (lambda t, n: t.update({n: t[n].double()}), "has dtype F64, not BF16 or F16 or F32"),
    "scale NaN": (lambda t, n: t[n].fill_(float("nan")), "holds NaN or infinity"),
    "scale huge": (lambda t, n: t[n].fill_(3e38), "a scale beyond"),
    "scale of no weight": (lambda t, n: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}), "is surplus"),
}


@pytest.mark.parametrize("name", FP8_DAMAGES)
def test_damaged_fp8(tmp_path: Path, name: str) -> None:
    change, message = FP8_DAMAGES[name]
    folder = tiny_folder(tmp_path / "m")
    make_fp8(folder)
    scale = "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv"
    rewrite(folder, lambda t: change(t, scale))
    with pytest.raises(CorruptCheckpoint, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size: must be two positive integers"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert: must be a list"),
        ({"quant_method": 8}, "quant_method: must be a word"),
        ({"bits": 4}, "quant_method: missing; read are fp8"),
        ([1], "must be an object"),
    ],
)
def test_a_damaged_quantization_is_refused_by_name(tmp_path: Path, quantization: object, message: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    edit_config(folder, quantization_config=quantization)
    with pytest.raises(ConfigError, match=f"config.json: quantization_config.*{message}"):
        load_model(folder)


_MEASURE = """
import sys
from qnext.checkpoint import load_model

def high_water():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

before = high_water()
model = load_model(sys.argv[1])
print(sum(parameter.nbytes for parameter in model.parameters()), high_water() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_stays_near_the_weights(tmp_path: Path) -> None:
    """Four shards of 100 MB: the mapped files must not add up beside the weights."""
    config = dataclasses.replace(CONFIGS["next"], hidden_size=512, num_experts=64, moe_intermediate_size=384)
    create_folder(config, tmp_path / "m", seed=0, max_shard_bytes=100_000_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) >= 4
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "m")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    weights, growth = map(int, output.split())
    assert weights > 350_000_000
    # Twice the weights without dropping pages; beside them there may be less than a shard.
    assert weights <= growth < weights + 60_000_000
