"""`qnext init`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.checkpoint import create_folder, load_model
from qnext.checkpoint.header import read_index
from qnext.config import preset
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import save_tokenizer, train_bpe
from tests.config.folder import read_config
from tests.provenance import content_of

from .command import CONFIG, Capture, run

SMALL = ("nano-5m", "--layers", 2, "--experts", 6)


def test_folder_is_complete(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "m"
    result = run(capsys, "init", "nano-5m", out, "--layers", 5, "--experts", 6, "--vocab-size", 512, "--seed", 3)
    assert (result.code, result.out) == (0, f"{out}\n")
    config = read_config(out)
    assert (config.num_hidden_layers, config.num_experts, config.vocab_size) == (5, 6, 512)
    assert config.layer_types == (*preset("nano-5m").layer_types, "linear_attention")
    tokenizer = Tokenizer.from_folder(out)
    text = "naïve 東京 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    names = {name: tokenizer.token_id(name) for name in ("<|im_end|>", "<|endoftext|>")}
    assert config.eos_token_ids == (names["<|im_end|>"], names["<|endoftext|>"])
    assert tokenizer.eos_ids == set(names.values())
    assert (config.bos_token_id, config.pad_token_id) == (names["<|endoftext|>"],) * 2
    assert {info.dtype for info in read_index(out).tensors.values()} == {"BF16"}
    assert run(capsys, "verify", out).code == 0
    model = load_model(out)
    assert model.mtp is not None
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in result.err


def test_ids_of_the_preset_do_not_outlive_a_smaller_vocabulary(tmp_path: Path, capsys: Capture) -> None:
    """The released end token is 151645."""
    arguments = ("--layers", 1, "--experts", 1, "--experts-per-token", 1, "--vocab-size", 271, "--no-mtp")
    assert run(capsys, "init", "80b-a3b", tmp_path / "m", *arguments).code == 0
    config = read_config(tmp_path / "m")
    assert all(token < 271 for token in config.eos_token_ids)
    assert config.hidden_size == preset("80b-a3b").hidden_size
    assert config.num_nextn_predict_layers == 0


def test_seed_and_dtype(tmp_path: Path, capsys: Capture) -> None:
    for name, *options in (("a", "--seed", 1), ("b", "--seed", 1), ("c", "--seed", 2), ("d", "--dtype", "float32")):
        assert run(capsys, "init", *SMALL, tmp_path / name, *options).code == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert {info.dtype for info in read_index(tmp_path / "d").tensors.values()} == {"F32"}


def test_tokenizer_is_copied(tmp_path: Path, capsys: Capture) -> None:
    tokenizer = train_bpe(["a few words and a few words more"] * 3, vocab_size=280)
    save_tokenizer(tokenizer, tmp_path / "t", model_max_length=64, chat_template="{{ x }}")
    assert run(capsys, "init", *SMALL, tmp_path / "m", "--tokenizer", tmp_path / "t").code == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()
    assert read_config(tmp_path / "m").eos_token_ids[0] == tokenizer.token_to_id("<|im_end|>")
    assert 258 not in read_config(tmp_path / "m").eos_token_ids


BAD = {
    "preset": (("nano-6m",), 3, "no preset 'nano-6m'; known: 80b-a3b"),
    "top-k above experts": (("nano-5m", "--experts", 3), 2, "4 experts per token of 3; --experts-per-token N"),
    "zero experts": (("nano-5m", "--experts", 0), 2, "--experts must be at least 1, not 0"),
    "zero experts per token": (("nano-5m", "--experts-per-token", 0), 2, "num_experts_per_tok must be positive"),
    "dense": (("qwen3-32b", "--experts", 4), 2, "this preset has no experts"),
    "layers": (("nano-5m", "--layers", 0), 2, "must be at least 1, not 0"),
    "negative layers": (("nano-5m", "--layers", -2), 2, "must be at least 1, not -2"),
    "vocabulary": (("nano-5m", "--vocab-size", 270), 2, "--vocab-size 270 is below the 271 tokens of the tokenizer"),
    "no vocabulary": (("nano-5m", "--vocab-size", 0), 2, "vocab_size must be positive"),
    "dtype": (("nano-5m", "--dtype", "int4"), 2, "--dtype int4: must be bfloat16 or float32"),
    "no tokenizer": (("nano-5m", "--tokenizer", "nowhere"), 3, "nowhere: no tokenizer.json here"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line_and_leave_nothing(tmp_path: Path, capsys: Capture, name: str) -> None:
    (preset_name, *options), code, message = BAD[name]
    result = run(capsys, "init", preset_name, tmp_path / "m", *options)
    assert result.code == code
    assert message in result.error_line
    assert list(tmp_path.iterdir()) == []


def test_existing_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/note").write_text("mine")
    result = run(capsys, "init", *SMALL, tmp_path / "m")
    assert (result.code, result.error_line) == (2, f"qnext init: {tmp_path / 'm'}: exists and is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_scheme(tmp_path: Path, capsys: Capture) -> None:
    """The folder that quantize makes of one without."""
    assert run(capsys, "init", *SMALL, tmp_path / "plain", "--seed", 4).code == 0
    assert run(capsys, "quantize", tmp_path / "plain", tmp_path / "q", "--scheme", "int4-g32").code == 0
    result = run(capsys, "init", *SMALL, tmp_path / "made", "--seed", 4, "--scheme", "int4-g32")
    assert (result.code, result.out) == (0, f"{tmp_path / 'made'}\n")
    assert "int4-g32, bfloat16, seed 4" in result.err
    assert content_of(tmp_path / "q") == content_of(tmp_path / "made")
    wrong = run(capsys, "init", *SMALL, tmp_path / "x", "--scheme", "int5")
    assert (wrong.code, "int4-g32" in wrong.error_line, (tmp_path / "x").exists()) == (2, True, False)


def test_vocabulary_of_the_weights_and_config_agree(tmp_path: Path) -> None:
    create_folder(CONFIG, tmp_path / "m", seed=0)
    assert json.loads((tmp_path / "m/config.json").read_text())["vocab_size"] == CONFIG.vocab_size
    assert read_config(tmp_path / "m") == CONFIG
