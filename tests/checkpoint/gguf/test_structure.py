"""Tensors that a file holds beside those that its keys describe, in other forms, and of every type."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qnext.checkpoint import create_folder
from qnext.checkpoint.gguf import export_gguf, import_gguf, read_gguf
from qnext.checkpoint.gguf.block_types import BLOCK_TYPES
from qnext.checkpoint.gguf.blocks import decode
from qnext.checkpoint.gguf.container import Value
from qnext.errors import CorruptCheckpoint, NotSupported, QnextWarning
from tests.config.folder import read_config

from .files import GGUF_CONFIGS, Raw, arrays_of, write_arrays
from .test_blocks import WITHOUT_REFERENCE, random_blocks
from .test_convert import KEYS, folder_of, tensors_of

Tensors = dict[str, np.ndarray | Raw]
CONFIG = GGUF_CONFIGS["next"]
BLOCKS = range(CONFIG.num_hidden_layers + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("structure") / "m")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    export_gguf(folder, folder.parent / "m.gguf", kind="f32", tokenizer_keys=KEYS)
    return folder.parent / "m.gguf"


def rewritten(plain: Path, target: Path, changes: Tensors, *, without: str = "", **keys: Value) -> Path:
    """The plain file with tensors added or replaced, those that match `without` left out."""
    kept = {name: data for name, data in arrays_of(plain).items() if not re.fullmatch(without, name)}
    return write_arrays(target, {**read_gguf(plain).keys, **keys}, kept | changes)


def assert_is_folder(back: Path, folder: Path) -> None:
    expected = tensors_of(folder)
    actual = tensors_of(back)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


PASSED_OVER: dict[str, Tensors] = {
    "frequencies": {"rope_freqs.weight": np.ones(4, dtype=np.float32)},
    "long and short": {f"rope_factors_{kind}.weight": np.ones(4, dtype=np.float32) for kind in ("long", "short")},
    "frequencies of a layer": {"blk.3.attn_rot_embd.weight": np.ones(4, dtype=np.float32)},
    "embedding and head of MTP": {
        f"blk.4.nextn.{part}.weight": np.ones((4, 4), dtype=np.float32) for part in ("embed_tokens", "shared_head_head")
    },
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_leftovers_are_passed_over(folder: Path, plain: Path, tmp_path: Path, name: str) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", PASSED_OVER[name])
    with pytest.warns(QnextWarning, match=f"tensors are ignored: {next(iter(PASSED_OVER[name]))}"):
        import_gguf(path, tmp_path / "back", dtype=torch.bfloat16)
    assert_is_folder(tmp_path / "back", folder)


@pytest.mark.parametrize("without", [r"blk\.4\.nextn\.enorm.*", r"blk\.4\.(attn|ffn|post)_?.*", r"blk\.4\..*"])
def test_a_layer_of_multi_token_prediction_that_is_not_whole(plain: Path, tmp_path: Path, without: str) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", {}, without=without)
    if "attn" in without:  # its own four tensors are there, so it is taken for whole
        with pytest.raises(CorruptCheckpoint, match=r"tensor blk\.4\.attn_norm\.weight is missing"):
            import_gguf(path, tmp_path / "back")
        return
    with pytest.warns(QnextWarning, match="multi-token prediction is declared but incomplete"):
        import_gguf(path, tmp_path / "back", dtype=torch.bfloat16)
    assert read_config(tmp_path / "back").num_nextn_predict_layers == 0


REFUSED: dict[str, tuple[Tensors, type[Exception], str]] = {
    "bias": ({"blk.3.attn_q.bias": np.ones(4, dtype=np.float32)}, NotSupported, "blk.3.attn_q.bias is unknown"),
    "sinks": ({"blk.3.attn_sinks.weight": np.ones(4, dtype=np.float32)}, NotSupported, "blk.3.attn_sinks.weight is un"),
    "layer": (
        {"blk.5.attn_q.weight": np.ones(4, dtype=np.float32)},
        CorruptCheckpoint,
        "blk.5.attn_q.weight is surplus",
    ),
    "scale of a head": (
        {"blk.0.ssm_out.scale": np.ones(3, dtype=np.float32)},
        CorruptCheckpoint,
        r"blk.0.ssm_out.scale has shape \[3\]",
    ),
    "shape": (
        {"blk.0.ssm_out.weight": np.ones((48, 31), dtype=np.float32)},
        CorruptCheckpoint,
        r"blk.0.ssm_out.weight has shape \[48, 31\], the keys ask for \[48, 32\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_the_model_would_have_to_multiply_by(plain: Path, tmp_path: Path, name: str) -> None:
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=f"m.gguf: tensor {message}") as caught:
        import_gguf(rewritten(plain, tmp_path / "m.gguf", changes), tmp_path / "back")
    assert type(caught.value) is error
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_dimension_of_one_of_the_convolution(folder: Path, plain: Path, tmp_path: Path) -> None:
    arrays = arrays_of(plain)
    changes = {name: data[:, None] for name, data in arrays.items() if "conv1d" in name}
    changes |= {name: data[:, None] for name, data in arrays.items() if "ssm_dt.bias" in name}
    import_gguf(rewritten(plain, tmp_path / "m.gguf", changes), tmp_path / "back", dtype=torch.bfloat16)
    assert_is_folder(tmp_path / "back", folder)


def test_an_older_name_of_the_time_step(folder: Path, plain: Path, tmp_path: Path) -> None:
    """And heads of keys as one number for each layer, zero where there are none: Ollama's converter wrote both."""
    arrays = arrays_of(plain)
    changes: Tensors = {name.removesuffix(".bias"): data for name, data in arrays.items() if "ssm_dt" in name}
    heads = [0 if kind == "linear_attention" else CONFIG.num_key_value_heads for kind in CONFIG.layer_types]
    keys: dict[str, Value] = {"qwen3next.attention.head_count_kv": [*heads, CONFIG.num_key_value_heads]}
    path = rewritten(plain, tmp_path / "m.gguf", changes, without=r".*\.ssm_dt\.bias", **keys)
    import_gguf(path, tmp_path / "back", dtype=torch.bfloat16)
    assert_is_folder(tmp_path / "back", folder)


def test_queries_keys_and_values_together(folder: Path, plain: Path, tmp_path: Path) -> None:
    """As the converter's --fuse-qkv writes them."""
    arrays = arrays_of(plain)
    changes: Tensors = {
        f"blk.{i}.attn_qkv.weight": np.concatenate([arrays[f"blk.{i}.attn_{part}.weight"] for part in "qkv"])
        for i in BLOCKS
        if f"blk.{i}.attn_q.weight" in arrays
    }
    assert len(changes) == 2
    path = rewritten(plain, tmp_path / "m.gguf", changes, without=r".*\.attn_[qkv]\.weight")
    import_gguf(path, tmp_path / "back", dtype=torch.bfloat16)
    assert_is_folder(tmp_path / "back", folder)


def test_experts_apart(folder: Path, plain: Path, tmp_path: Path) -> None:
    """As files held them before llama.cpp stacked them."""
    changes: Tensors = {
        name.replace("_exps", f".{expert}"): matrix
        for name, data in arrays_of(plain).items()
        if "_exps" in name
        for expert, matrix in enumerate(data)
    }
    assert len(changes) == 3 * len(BLOCKS) * CONFIG.num_experts
    path = rewritten(plain, tmp_path / "m.gguf", changes, without=r".*_exps\.weight")
    import_gguf(path, tmp_path / "back", dtype=torch.bfloat16)
    assert_is_folder(tmp_path / "back", folder)


def test_a_factor_beside_a_tensor(folder: Path, plain: Path, tmp_path: Path) -> None:
    """One for a matrix or one for each expert, as files from ModelOpt's NVFP4 have them; those of inputs do nothing."""
    scales = 2.0 ** np.arange(CONFIG.num_experts, dtype=np.float32)
    changes: Tensors = {
        "blk.0.ffn_up_exps.scale": scales,
        "blk.0.ssm_out.scale": np.array([0.25], dtype=np.float32),
        "blk.0.ssm_out.input_scale": np.array([7.0], dtype=np.float32),
    }
    import_gguf(rewritten(plain, tmp_path / "m.gguf", changes), tmp_path / "back", dtype=torch.bfloat16)
    actual, expected = tensors_of(tmp_path / "back"), tensors_of(folder)
    for name, tensor in expected.items():
        factor = 1.0
        if match := re.fullmatch(r"model\.layers\.0\.mlp\.experts\.(\d)\.up_proj\.weight", name):
            factor = float(scales[int(match[1])])
        elif name == "model.layers.0.linear_attn.out_proj.weight":
            factor = 0.25
        assert torch.equal(actual[name], tensor * factor), name


def test_a_factor_keeps_a_matrix_from_being_packed(plain: Path, tmp_path: Path) -> None:
    data = arrays_of(plain)["blk.0.ffn_down_shexp.weight"]
    packed = Raw("Q8_0", data.shape, gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0))
    for scale in ({}, {"blk.0.ffn_down_shexp.scale": np.array([4.0], dtype=np.float32)}):
        changes: Tensors = {"blk.0.ffn_down_shexp.weight": packed, **scale}
        path = rewritten(plain, tmp_path / f"{len(scale)}.gguf", changes)
        report = import_gguf(path, tmp_path / f"back{len(scale)}")
        assert (report.packed, report.dequantized) == (
            ((), ("blk.0.ffn_down_shexp.weight",)) if scale else (("blk.0.ffn_down_shexp.weight",), ())
        )


def test_floats_of_several_kinds(folder: Path, plain: Path, tmp_path: Path) -> None:
    """F16, BF16, F32 and F64 beside each other become bf16, and what that rounds is named."""
    arrays = arrays_of(plain)
    kinds = {"blk.0.ssm_out.weight": "F16", "blk.1.ssm_out.weight": "BF16", "blk.2.ssm_out.weight": "F64"}
    changes: Tensors = {}
    for name, kind in kinds.items():
        stored = arrays[name].astype(np.float64) if kind == "F64" else arrays[name]
        if kind != "F64":
            stored = gguf.quants.quantize(arrays[name], gguf.GGMLQuantizationType[kind])
        changes[name] = Raw(kind, arrays[name].shape, stored)
    changes["blk.3.attn_k.weight"] = Raw(
        "F16", arrays["blk.3.attn_k.weight"].shape, (arrays["blk.3.attn_k.weight"] * 1.001).astype(np.float16)
    )
    report = import_gguf(rewritten(plain, tmp_path / "m.gguf", changes), tmp_path / "back")
    assert report == (torch.bfloat16, (), (), ("blk.3.attn_k.weight",))
    actual, expected = tensors_of(tmp_path / "back"), tensors_of(folder)
    for i in range(3):
        name = f"model.layers.{i}.linear_attn.out_proj.weight"
        assert torch.equal(actual[name], expected[name])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a model whose rows are whole blocks of 256."""
    root = tmp_path_factory.mktemp("wide")
    config = replace(GGUF_CONFIGS["dense"], hidden_size=256, intermediate_size=256, vocab_size=32, head_dim=8)
    create_folder(config, root / "m", seed=1)
    export_gguf(root / "m", root / "m.gguf", kind="f32", tokenizer_keys=KEYS)
    return root / "m.gguf"


@pytest.mark.parametrize("name", [name for name, block in BLOCK_TYPES.items() if block.num_items > 1])
def test_every_type_beside_others(wide: Path, tmp_path: Path, name: str) -> None:
    """Two matrices in the type, as quantised mixtures have them, with any codes."""
    block = BLOCK_TYPES[name]
    blocks_NB = random_blocks(name).reshape(-1, block.num_bytes)[5:]
    changes: Tensors = {}
    places = {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
    }
    for stored in places:
        shape = read_gguf(wide).tensors[stored].shape
        count = shape[0] * shape[1] // block.num_items
        changes[stored] = Raw(name, shape, blocks_NB[np.arange(count) % len(blocks_NB)].reshape(shape[0], -1))
    report = import_gguf(rewritten(wide, tmp_path / "m.gguf", changes), tmp_path / "back", dequantize=True)
    assert set(report.dequantized) == places.keys()
    assert report.dtype == torch.bfloat16
    actual = tensors_of(tmp_path / "back")
    for stored, disk_name in places.items():
        raw = changes[stored]
        assert isinstance(raw, Raw)
        if name in WITHOUT_REFERENCE:
            expected = decode(torch.from_numpy(raw.data), block)
        else:
            expected = torch.from_numpy(gguf.quants.dequantize(raw.data, gguf.GGMLQuantizationType[name]))
        assert torch.equal(actual[disk_name], expected.to(torch.bfloat16))
