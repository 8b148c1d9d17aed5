"""The headers of a folder are read once for a command: of a large model they take seconds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qnext.checkpoint import header
from qnext.errors import CorruptCheckpoint
from qnext.session.folder import load_weights, open_folder, open_model
from qnext.session.served import ServeConfig, load_served

from .command import Capture, run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose headers were read, in turn."""
    found: list[Path] = []
    read_header = header.read_header

    def noting(path: Path) -> dict[str, header.TensorInfo]:
        found.append(path)
        return read_header(path)

    monkeypatch.setattr(header, "read_header", noting)
    return found


@pytest.mark.parametrize(
    "words",
    [
        "generate MODEL x --max-tokens 1",
        "logits MODEL --tokens 1 --out OUT/o.npy",
        "inspect MODEL",
        "verify MODEL",
        "experts MODEL x",
        "doctor MODEL",
        "doctor MODEL --quick",
    ],
)
def test_commands(words: str, plain_folder: Path, tmp_path: Path, capsys: Capture, read: list[Path]) -> None:
    result = run(capsys, *words.replace("MODEL", str(plain_folder)).replace("OUT", str(tmp_path)).split())
    assert result.code == 0, result.err
    assert read == [plain_folder / "model.safetensors"]


def test_a_server(plain_folder: Path, read: list[Path]) -> None:
    folder = open_folder(str(plain_folder))
    load_served(folder, ServeConfig(names=["m"], engine={"max_num_seqs": 1}))
    assert len(read) == 1
    assert folder.layout is None, "what is not needed any more is kept"
    load_served(folder, ServeConfig(names=["m"], engine={"max_num_seqs": 1}))
    assert len(read) == 2


def test_files_that_change_before_they_are_loaded(plain_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_folder, tmp_path / "m")
    folder = open_model(str(tmp_path / "m"))
    os.utime(tmp_path / "m" / "model.safetensors", ns=(1, 1))
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: changed while it was read"):
        load_weights(folder, None)
