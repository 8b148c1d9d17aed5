"""`qnext logits`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qnext.checkpoint import load_model
from qnext.model import Batch

from .command import CONFIG, Capture, make_model, poke, run


def _expected(folder: Path, ids: list[int], dtype: torch.dtype | None = None) -> np.ndarray:
    model = load_model(folder, dtype=dtype)
    with torch.no_grad():
        hidden_TD = model(Batch.from_lengths(torch.tensor(ids), [len(ids)])).hidden_TD
        return model.logits(hidden_TD).float().numpy()


def test_logits_are_the_models(tmp_path: Path, capsys: Capture) -> None:
    folder, out = make_model(tmp_path), tmp_path / "l.npy"
    result = run(capsys, "logits", folder, "--tokens", "5,299, 0,5", "--out", out, "--dtype", "float32")
    assert result == (0, f"{out}\n", "")
    values = np.load(out)
    assert (values.dtype, values.shape) == (np.float32, (4, 300))
    np.testing.assert_array_equal(values, _expected(folder, [5, 299, 0, 5], torch.float32))
    assert run(capsys, "logits", folder, "--tokens", "5,299,0,5", "--out", out).code == 0
    np.testing.assert_array_equal(np.load(out), _expected(folder, [5, 299, 0, 5]))


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 70, 1000])
def test_chunks_change_nothing(tmp_path: Path, capsys: Capture, chunk: int) -> None:
    folder = make_model(tmp_path)
    ids = [(7 * i) % 300 for i in range(70)]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    arguments = ("logits", folder, "--tokens", f"@{tmp_path / 'ids.json'}", "--dtype", "float32")
    assert run(capsys, *arguments, "--out", tmp_path / "l.npy", "--chunk", chunk).code == 0
    expected = _expected(folder, ids, torch.float32)
    np.testing.assert_allclose(np.load(tmp_path / "l.npy"), expected, atol=1e-5 * abs(expected).max())


BAD = {
    "too large": ("1,300", 2, "id 300 at place 1 is outside the vocabulary of 300"),
    "negative": ("1,-4", 2, "id -4 at place 1 is outside the vocabulary"),
    "empty": ("", 2, "no token given"),
    "words": ("1,two", 2, "must be integers with commas between, or @FILE"),
    "fraction": ("1.5", 2, "must be integers"),
    "too long": (",".join(["1"] * 129), 4, "129 tokens, but the context is 128"),
    "missing file": ("@nowhere.json", 2, "nowhere.json: No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tokens(tmp_path: Path, capsys: Capture, name: str) -> None:
    tokens, code, message = BAD[name]
    result = run(capsys, "logits", make_model(tmp_path), "--tokens", tokens, "--out", tmp_path / "l.npy")
    assert result.code == code
    assert message in result.error_line
    assert not list(tmp_path.glob("*l.npy*"))


@pytest.mark.parametrize("text", ["[1, 2.0]", "[true]", '{"a": 1}', "[", "[]", '"12"'])
def test_bad_token_files(tmp_path: Path, capsys: Capture, text: str) -> None:
    (tmp_path / "ids.json").write_text(text)
    arguments = ("--tokens", f"@{tmp_path / 'ids.json'}", "--out", tmp_path / "l.npy")
    result = run(capsys, "logits", make_model(tmp_path), *arguments)
    assert result.code == 2
    assert result.error_line
    assert not (tmp_path / "l.npy").exists()


def test_bad_options(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    for options, message in (
        (("--chunk", 0), "--chunk must be at least 1"),
        (("--dtype", "int8"), "must be float32 or bfloat16"),
        (("--out", tmp_path / "no" / "l.npy"), "no such folder"),
    ):
        result = run(capsys, "logits", folder, "--tokens", "1", "--out", tmp_path / "l.npy", *options)
        assert result.code == 2
        assert message in result.error_line


def test_a_damaged_model_leaves_an_older_file_alone(tmp_path: Path, capsys: Capture) -> None:
    folder, out = make_model(tmp_path), tmp_path / "l.npy"
    poke(folder, "model.norm.weight", b"\xc0\x7f")
    out.write_text("older")
    result = run(capsys, "logits", folder, "--tokens", "1", "--out", out)
    assert result.code == 5
    assert "model.norm.weight holds NaN" in result.error_line
    assert out.read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == {"l.npy", "model", "made-tokenizer"}


def test_the_context_is_usable_to_its_end(tmp_path: Path, capsys: Capture) -> None:
    tokens = ",".join(["7"] * CONFIG.max_position_embeddings)
    result = run(capsys, "logits", make_model(tmp_path), "--tokens", tokens, "--out", tmp_path / "l.npy", "--chunk", 50)
    assert result.code == 0
