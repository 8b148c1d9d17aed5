"""qnext quantize as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import create_folder
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.cli.command import QUANTIZABLE, Capture, edit_json, run
from tests.cli.local_hub import LocalHub
from tests.forked import Program
from tests.provenance import content_of

TEXT = "The scale of a group is chosen before its codes. " * 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("quantize")
    save_tokenizer(byte_level_tokenizer(), parent / "tokenizer", model_max_length=128)
    create_folder(QUANTIZABLE, parent / "model", seed=1, tokenizer_folder=parent / "tokenizer")
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
        (["--scheme", "int8", "--revision", "main"], "--from-hub"),
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


def test_shard_by_shard(tmp_path: Path, capsys: Capture) -> None:
    """The same folder as of a source that stays."""
    create_folder(QUANTIZABLE, tmp_path / "source", seed=1, max_shard_bytes=100_000)
    arguments = ("quantize", tmp_path / "source", tmp_path / "out", "--scheme", "int8")
    assert run(capsys, *arguments[:2], tmp_path / "expected", *arguments[3:]).code == 0
    with_text = run(capsys, *arguments, "--delete-source-shards", "--text", tmp_path / "t")
    assert with_text.code == 2 and "--text needs the whole model" in with_text.error_line
    result = run(capsys, *arguments, "--delete-source-shards")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}\n")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")
    assert list((tmp_path / "source").glob("*.safetensors")) == []
    again = run(capsys, *arguments, "--delete-source-shards")
    assert again.code == 2 and "exists and is not empty" in again.error_line


def from_hub(hub: LocalHub, home: Path, out: Path) -> Program:
    """In a process of its own: the address of the hub is read once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return Program(
        ["-m", "qnext", "quantize", "org/model", out, "--scheme", "int8", "--from-hub"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
    )


def test_from_the_hub(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """One shard at a time; killed in the midst of a download, and a download that differs from what was announced."""
    create_folder(QUANTIZABLE, tmp_path / "hub", seed=1, tokenizer_folder=model, max_shard_bytes=100_000)
    assert run(capsys, "quantize", tmp_path / "hub", tmp_path / "expected", "--scheme", "int8").code == 0
    shards = sorted(path.name for path in (tmp_path / "hub").glob("*.safetensors"))
    source, made = (tmp_path / "out.unfinished" / name for name in ("source", "made"))
    with LocalHub(tmp_path / "hub").running() as hub:
        hub.holds = shards[3]
        child = from_hub(hub, tmp_path / "home", tmp_path / "out")
        assert hub.is_held.wait(60), child.communicate(timeout=10)
        assert not list(source.glob("*.safetensors")) and list(made.glob("*.safetensors"))
        child.kill()
        child.communicate()
        hub.holds, hub.announced = None, {shards[4]: "0" * 64}
        _, err = (child := from_hub(hub, tmp_path / "home", tmp_path / "out")).communicate()
        assert child.returncode == 5 and f"{shards[4]}: the hub announced other bytes" in err.splitlines()[-1]
        assert not (tmp_path / "out").exists() and not (made / "config.json").exists()
        hub.announced = {}
        out, err = (child := from_hub(hub, tmp_path / "home", tmp_path / "out")).communicate()
    assert (child.returncode, out) == (0, f"{tmp_path / 'out'}\n"), err
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")
    times = {name: sum(each == name for each, _ in hub.ranges) for name in shards}
    assert times == {name: 1 + (name in shards[3:5]) for name in shards}
    assert not (tmp_path / "out.unfinished").exists()


def test_a_hub_that_has_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/README.md").write_text("a data set")
    with LocalHub(tmp_path / "hub").running() as hub:
        _, err = (child := from_hub(hub, tmp_path / "home", tmp_path / "out")).communicate()
    assert child.returncode == 3 and "holds no safetensors files" in err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "home"}


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
