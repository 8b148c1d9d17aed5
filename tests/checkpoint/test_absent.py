"""What a folder or its configuration leaves out: drafters, sizes, heads and biases."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint import load_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.header import read_index
from qnext.errors import CorruptCheckpoint, QnextWarning

from .folders import CONFIGS, edit_config, rewrite, tiny_folder, tiny_model
from .test_load import assert_same_weights

Tensors = dict[str, Tensor]
_EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(gate|up|down)_proj\.(weight\S*)")


def _drop(names: Callable[[str], bool]) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if names(name)]


_UNUSED = r"multi-token prediction: \d+ tensors? \(mtp.\*\) (is|are) not used"
# What config.json says of the number of layers, what becomes of the tensors, and the first warning.
MTP: dict[str, tuple[int | None, Callable[[Tensors], object], str]] = {
    "declared, none there": (
        1,
        _drop(lambda name: name.startswith("mtp.")),
        r"asked for by config.json: tensor mtp.fc.weight and \d+ more are missing",
    ),
    "declared, one missing": (1, _drop(lambda name: name == "mtp.fc.weight"), r"incomplete: tensor mtp.fc.weight is"),
    "silent, an expert missing": (
        None,
        _drop(lambda name: name == "mtp.layers.0.mlp.experts.4.up_proj.weight"),
        r"incomplete: tensor mtp.layers.0.mlp",
    ),
    "denied, all there": (0, lambda tensors: None, _UNUSED),
    "denied, one there": (0, _drop(lambda name: name.startswith("mtp.") and name != "mtp.norm.weight"), _UNUSED),
    "denied, and damaged": (0, lambda tensors: tensors["mtp.fc.weight"].fill_(torch.nan), _UNUSED),
    "two layers": (2, lambda tensors: None, "num_nextn_predict_layers is 2"),
}


@pytest.mark.parametrize("name", MTP)
def test_without_its_drafter_the_trunk_loads(tmp_path: Path, name: str) -> None:
    declared, change, words = MTP[name]
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, change)
    edit_config(folder, num_nextn_predict_layers=declared)
    with pytest.warns(QnextWarning) as caught:
        model = load_model(folder)
    assert re.search(words, str(caught[0].message))
    expected = dict(tiny_model().named_parameters())
    assert model.mtp is None
    assert model.config == CONFIGS["next"].with_(num_nextn_predict_layers=0)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[key]), key


def test_more_than_the_drafter_needs_is_passed_over(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, lambda t: t.update({"mtp.embed_tokens.weight": t["model.embed_tokens.weight"].clone()}))
    with pytest.warns(QnextWarning, match=r"1 tensor \(mtp.\*\) is not used"):
        assert_same_weights(load_model(folder), tiny_model())


def test_a_drafter_beside_a_family_without_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    rewrite(folder, lambda t: t.update({"mtp.fc.weight": torch.ones(2, 2)}))
    with pytest.warns(QnextWarning, match="multi-token prediction"):
        assert_same_weights(load_model(folder), tiny_model("moe"))


OPEN = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "mlp_only_layers",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "attention_bias",
    "tie_word_embeddings",
]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "next tied"])
def test_sizes_that_the_file_leaves_out_are_those_of_the_tensors(tmp_path: Path, name: str) -> None:
    folder, expected = tiny_folder(tmp_path / "m", name), CONFIGS[name]
    is_dense = any(not expected.is_moe_layer(i) for i in range(expected.num_hidden_layers))
    written = (folder / "config.json").read_text()
    left_out = [key for key in OPEN if is_dense or key != "intermediate_size"]
    if expected.tie_word_embeddings:
        left_out.remove("tie_word_embeddings")
    index = read_index(folder)
    for keys in (*([key] for key in left_out), left_out):
        edit_config(folder, **dict.fromkeys(keys))
        assert read_layout(index).config == expected, keys
        (folder / "config.json").write_text(written)


def test_without_a_head_and_without_a_word_the_embedding_is_the_head(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "dense tied")
    edit_config(folder, tie_word_embeddings=None)
    with pytest.warns(QnextWarning, match=r"there is no lm_head.weight: the embedding serves"):
        assert_same_weights(load_model(folder), tiny_model("dense tied"))
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CorruptCheckpoint, match=r"tensor lm_head.weight is missing"):
        load_model(folder)


@pytest.mark.parametrize("rows", [7, -7])
def test_rows_of_the_embedding_count(tmp_path: Path, rows: int) -> None:
    """Padded by a trainer, or cut: embedding and head agree, and config.json says another number."""
    folder = tiny_folder(tmp_path / "m", "dense")
    edit_config(folder, vocab_size=CONFIGS["dense"].vocab_size + rows)
    with pytest.warns(QnextWarning, match=r"vocab_size is \d+, but the embedding has 310 rows"):
        assert_same_weights(load_model(folder), tiny_model("dense"))
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.zeros(400, 40)}))
    with pytest.raises(CorruptCheckpoint, match=r"has shape \[\d+, 40\], config.json asks for"):
        load_model(folder)


def test_a_bias_that_the_file_does_not_mention_is_used(tmp_path: Path) -> None:
    from qnext.checkpoint import save_model
    from qnext.model import CausalLM, initialize

    model = CausalLM(CONFIGS["dense"].with_(attention_bias=True))
    initialize(model, seed=1)
    save_model(model, tmp_path / "m")
    edit_config(tmp_path / "m", attention_bias=None)
    assert_same_weights(load_model(tmp_path / "m"), model)
    edit_config(tmp_path / "m", attention_bias=False)
    with pytest.raises(CorruptCheckpoint, match=r"bias is surplus"):
        load_model(tmp_path / "m")
