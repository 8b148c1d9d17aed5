"""qnext quantize as a user calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import create_folder
from qnext.config import preset
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.cli.command import Capture, edit_json, run

CONFIG = replace(
    preset("nano-5m").with_layers(2), vocab_size=300, hidden_size=64, num_experts=3, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32, max_position_embeddings=128,
    bos_token_id=256, eos_token_id=(258, 256), pad_token_id=256,
)  # fmt: skip
TEXT = "The scale of a group is chosen before its codes. " * 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("quantize")
    save_tokenizer(byte_level_tokenizer(), parent / "tokenizer", model_max_length=128)
    create_folder(CONFIG, parent / "model", seed=1, tokenizer_folder=parent / "tokenizer")
    return parent / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_path_on_stdout_table_on_stderr(model: Path, tmp_path: Path, capsys: Capture) -> None:
    result = run(capsys, "quantize", model, tmp_path / "out", "--scheme", "int8")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}\n")
    assert "self_attn.q_proj" in result.err or "linear_attn.in_proj_qkvz" in result.err
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    stored = json.loads((tmp_path / "out/config.json").read_text())
    original = json.loads((model / "config.json").read_text())
    assert stored.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert stored == original


def test_report_of_a_calibrated_model(model: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    report = tmp_path / "report.json"
    arguments = ("quantize", model, tmp_path / "out", "--scheme", "int4-g32", "--text", text)
    result = run(capsys, *arguments, "--report", report, "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert values == json.loads(report.read_text())
    assert values["method"] == "gptq"
    assert values["text"]["perplexity_quantized"] > 1
    assert 0.5 < len(TEXT) / (values["num_calibration_tokens"] + values["text"]["num_tokens"]) < 2
    assert len(values["text"]["routers"]) == 2


def test_wrong_words_are_usage_errors(model: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    for arguments, wrong in (
        (["--scheme", "int5"], "'int5'"),
        (["--scheme", "int8", "--head", "fp8"], "'fp8'"),
        (["--scheme", "int8", "--head", "int8"], "no head of its own"),
        (["--scheme", "int8", "--text", str(text), "--method", "awq"], "awq"),
        (["--scheme", "int8", "--report", str(text)], "exists"),
    ):
        result = run(capsys, "quantize", model, out, *arguments)
        assert result.code == 2
        assert wrong in result.error_line
        assert not out.exists()


def test_texts_that_cannot_calibrate(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("a few words")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80" * 100)
    for name, wrong in (("empty", "empty"), ("short", "11 tokens"), ("binary", "UTF-8"), ("absent", "No such file")):
        result = run(capsys, "quantize", model, tmp_path / "out", "--scheme", "int8", "--text", tmp_path / name)
        assert result.code == 2
        assert wrong in result.error_line and name in result.error_line
    assert not (tmp_path / "out").exists()


def test_folders(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run(capsys, "quantize", tmp_path / "none", tmp_path / "out", "--scheme", "int8").code == 3
    result = run(capsys, "quantize", model, model, "--scheme", "int8")
    assert result.code == 2 and "not empty" in result.error_line
    assert run(capsys, "quantize", model, tmp_path / "out", "--scheme", "int8").code == 0
    result = run(capsys, "quantize", tmp_path / "out", tmp_path / "again", "--scheme", "int4-g32")
    assert result.code == 2 and "quantised already" in result.error_line
    edit_json(tmp_path / "out/config.json", lambda values: values.update(hidden_size=0))
    result = run(capsys, "quantize", tmp_path / "out", tmp_path / "again", "--scheme", "int4-g32")
    assert result.code == 5 and "hidden_size" in result.error_line
