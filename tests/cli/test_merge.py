"""`qnext merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model
from qnext.checkpoint.adapters import save_adapter
from qnext.lora import LoraConfig, adapter_of, add_lora
from tests.lora.models import with_random_lora

from .command import Capture, make_model, run


def make_adapter(base: Path, folder: Path, *, named: bool = True) -> Path:
    model = load_model(base, dtype=torch.float32)
    with_random_lora(model, LoraConfig("attention", rank=2))
    save_adapter(adapter_of(model), folder, model.config, base=str(base) if named else None)
    return folder


def test_a_run_is_merged_and_runs(tmp_path: Path, capsys: Capture) -> None:
    base = make_model(tmp_path)
    make_adapter(base, tmp_path / "run" / "adapter")
    result = run(capsys, "merge", tmp_path / "run", tmp_path / "out")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out'}\n")
    assert "tensors copied as they are" in result.err
    assert "weights in bfloat16 rounded once: error" in result.err
    assert run(capsys, "verify", tmp_path / "out").code == 0
    for folder in (base, tmp_path / "out"):
        assert run(capsys, "logits", folder, "--tokens", "1,2,3", "--out", tmp_path / f"{folder.name}.npy").code == 0
    assert (tmp_path / f"{base.name}.npy").read_bytes() != (tmp_path / "out.npy").read_bytes()


def test_what_is_missing_is_named(tmp_path: Path, capsys: Capture) -> None:
    base = make_model(tmp_path)
    adapter = make_adapter(base, tmp_path / "adapter", named=False)
    result = run(capsys, "merge", tmp_path / "none", tmp_path / "out")
    assert (result.code, "no such folder" in result.error_line) == (3, True)
    result = run(capsys, "merge", base, tmp_path / "out")
    assert (result.code, "no adapter there" in result.error_line) == (3, True)
    result = run(capsys, "merge", adapter, tmp_path / "out")
    assert (result.code, "--base" in result.error_line) == (2, True)
    result = run(capsys, "merge", adapter, tmp_path / "out", "--base", "elsewhere")
    assert (result.code, "elsewhere" in result.error_line) == (3, True)
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    result = run(capsys, "merge", adapter, tmp_path / "out", "--base", base)
    assert (result.code, "adapter_model.safetensors" in result.error_line) == (5, True)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    result = run(capsys, "merge", adapter, tmp_path / "out", "--base", base)
    assert (result.code, "use_dora" in result.error_line) == (6, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", ["attention", "experts"])
def test_an_adapter_that_changes_nothing_is_an_error(targets: str, tmp_path: Path, capsys: Capture) -> None:
    base = make_model(tmp_path)
    model = load_model(base, dtype=torch.float32)
    add_lora(model, LoraConfig(targets))  # type: ignore[arg-type]
    save_adapter(adapter_of(model), tmp_path / "adapter", model.config, base=str(base))
    result = run(capsys, "merge", tmp_path / "adapter", tmp_path / "out")
    assert (result.code, "changes nothing" in result.error_line) == (2, True)
