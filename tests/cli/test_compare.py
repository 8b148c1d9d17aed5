"""`qnext compare`: its forms, precisions, backends and adapters, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qnext.checkpoint import create_folder, load_model
from qnext.checkpoint.adapters import save_adapter
from qnext.lora.adapt import adapter_of, add_lora
from qnext.lora.config import LoraConfig
from qnext.ops import backends

from .command import QUANTIZABLE, Capture, run


def document(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, Any]:
    result = run(capsys, "compare", *arguments, "--json")
    assert result.code == code, result.err
    parsed: dict[str, Any] = json.loads(result.out)
    return parsed


def test_a_folder_is_equal_to_itself(plain_folder: Path, capsys: Capture, tmp_path: Path) -> None:
    found = document(capsys, plain_folder, plain_folder, "--exact")
    assert found["exact"] and found["num_tokens"] == 64 and found["first_bits"] is None
    picture = tmp_path / "parted.svg"
    table = run(capsys, "compare", plain_folder, plain_folder, "some words", "--picture", picture)
    assert table.code == 0 and "every tap has the same bits" in table.out, table.err
    ElementTree.parse(picture)


def test_precision_scheme_and_adapter(plain_folder: Path, capsys: Capture, tmp_path: Path) -> None:
    low = document(capsys, plain_folder, plain_folder, "--tokens", "1,2,3", "--dtype-b", "bfloat16", "--exact", code=1)
    assert low["first_bits"]["tap"] == "embedding" and low["num_tokens"] == 3
    source = tmp_path / "source"
    create_folder(QUANTIZABLE, source, seed=1)
    rounded = document(capsys, source, source, "--random", "8", "--scheme-b", "int8-g32")
    assert rounded["weights"]["other_form"] and rounded["first_beyond"] is not None
    model = load_model(plain_folder)
    add_lora(model, LoraConfig(rank=2), seed=0)
    save_adapter(adapter_of(model), tmp_path / "run", model.config, base=str(plain_folder))
    with_adapter = document(capsys, plain_folder, tmp_path / "run", "--random", "8")
    assert with_adapter["b"] == str(tmp_path / "run")
    assert with_adapter["first_bits"] is None and with_adapter["weights"]["only_b"]  # its B begins with zeros


@pytest.mark.skipif(backends.cpu_kernels() is None, reason="the native kernels are not built")
def test_a_backend_runs_in_a_process_of_its_own(plain_folder: Path, capsys: Capture) -> None:
    found = document(capsys, plain_folder, plain_folder, "--random", "6", "--backend-b", "torch")
    assert found["b"].endswith(" torch") and found["weights"]["other_bits"] == []
    assert found["logits"]["mean_kl"] < 1e-6  # fp32


def test_what_is_refused(plain_folder: Path, capsys: Capture, tmp_path: Path) -> None:
    for arguments, word in (
        (["x", "--tokens", "1"], "give one of"),
        (["--tokens", "1,999999"], "outside the vocabulary"),
        (["--backend-b", "metal"], "backend must be cpu or torch"),
        (["--scheme-b", "int3"], "no scheme"),
        (["--dtype-b", "float8"], "dtype must be"),
        (["--picture", tmp_path / "a.gif"], ".png or .svg"),
    ):
        result = run(capsys, "compare", plain_folder, plain_folder, *arguments)
        assert result.code == 2
        assert word in result.error_line
