"""`qnext convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.checkpoint import create_folder
from qnext.checkpoint.gguf import read_gguf
from qnext.config import read_config

from .command import CONFIG, Capture, make_model, run


def test_there_and_back(tmp_path: Path, capsys: Capture) -> None:
    folder = make_model(tmp_path)
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    assert run(capsys, "convert", folder, file) == (0, f"{file}\n", "")
    assert read_gguf(file).tensors["blk.0.ssm_out.weight"].block.name == "BF16"
    assert run(capsys, "convert", file, back) == (0, f"{back}\n", "")
    assert run(capsys, "verify", back).code == 0
    assert read_config(back) == read_config(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_text() == (folder / name).read_text()
    tokens = ("--tokens", "1,2,3", "--out")
    for source, out in ((folder, "a.npy"), (back, "b.npy")):
        assert run(capsys, "logits", source, *tokens, tmp_path / out).code == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_types(tmp_path: Path, capsys: Capture, kind: str) -> None:
    file, back = tmp_path / "m.gguf", tmp_path / "back"
    assert run(capsys, "convert", make_model(tmp_path), file, "--type", kind).code == 0
    assert read_gguf(file).tensors["blk.0.ssm_out.weight"].block.name == kind.upper()
    result = run(capsys, "convert", file, back, "--dtype", "float32", "--dequantize")
    assert result.code == 0
    assert ("quantised tensors were made float32" in result.err) == kind.startswith("q")
    assert "rounded" not in result.err
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"


def test_rounding_is_said(tmp_path: Path, capsys: Capture) -> None:
    create_folder(CONFIG, tmp_path / "f32", seed=1, tokenizer_folder=make_model(tmp_path), dtype=_float32())
    file = tmp_path / "m.gguf"
    assert run(capsys, "convert", tmp_path / "f32", file).code == 0
    result = run(capsys, "convert", file, tmp_path / "back")
    assert result.code == 0
    assert "tensors were rounded to bfloat16" in result.err


def _float32() -> object:
    import torch

    return torch.float32


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("model", "out"), 2, "must be a GGUF file that ends in .gguf"),
        (("m.gguf", "n.gguf"), 2, "must be a GGUF file that ends in .gguf"),
        (("model", "n.gguf", "--type", "q2"), 2, "--type q2: must be one of f32"),
        (("model", "n.gguf", "--dtype", "float32"), 2, "--dtype and --dequantize are for a folder"),
        (("m.gguf", "out", "--type", "f32"), 2, "--type is for OUT.gguf"),
        (("m.gguf", "out", "--dtype", "int8"), 2, "--dtype int8: must be one of"),
        (("model", "m.gguf"), 2, "m.gguf: exists"),
        (("m.gguf", "model"), 2, "exists and is not empty"),
        (("nothing.gguf", "out"), 3, "nothing.gguf: no such file"),
        (("bad.gguf", "out"), 5, "bad.gguf: no GGUF file but zeros"),
        (("80b-a3b", "n.gguf"), 3, "is a preset and has no weights"),
    ],
)
def test_refusals(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path)
    assert run(capsys, "convert", "model", "m.gguf").code == 0
    Path("bad.gguf").write_bytes(bytes(100))
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run(capsys, "convert", *arguments)
    assert result.code == code
    assert message in result.error_line
    assert sorted(path.name for path in tmp_path.iterdir()) == before
