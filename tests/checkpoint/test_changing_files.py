"""Files that are cut, replaced or written to while they are read: an error that names file and tensor, never SIGBUS."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qnext.checkpoint import load_model, reading
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.gguf import export_gguf, import_gguf
from qnext.checkpoint.gguf.parts import read_gguf
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.quantize import quantize_folder
from qnext.checkpoint.reading import FileReader, read_tensors
from qnext.diagnostics.folder import examine
from qnext.errors import CorruptCheckpoint
from qnext.quant.scheme import QuantPolicy, QuantScheme

from .folders import tiny_folder
from .gguf.test_convert import folder_of
from .packed_folders import FORMS, packed_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(9000), "b": torch.ones(300, 30)}, tmp_path / "model.safetensors")
    return tmp_path


READERS: dict[str, Callable[[TensorFiles], object]] = {
    "whole": lambda files: files.read("b"),
    "pieces": lambda files: list(files.pieces("b")),
    "in place": lambda files: list(files.pieces("b", into=torch.empty(300, 30))),
    "rows": lambda files: files.read_rows("b", 100, 300),
}


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("is_open", [False, True], ids=["unopened", "open"])
def test_a_cut_file_is_named_with_its_tensor(folder: Path, how: str, is_open: bool) -> None:
    path = folder / "model.safetensors"
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: truncated while tensor b was read"):  # noqa: SIM117
        with TensorFiles(folder) as files:
            if is_open:
                files.read("a")
            os.truncate(path, path.stat().st_size - 5000)
            READERS[how](files)


@pytest.mark.parametrize("is_open", [False, True], ids=["unopened", "open"])
@pytest.mark.parametrize("change", ["grown", "written", "replaced"])
def test_a_file_that_changes_is_named(folder: Path, change: str, is_open: bool) -> None:
    path = folder / "model.safetensors"
    if change == "replaced" and is_open:
        pytest.skip("the file that was opened is still there, whole")
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: changed while it was read"):  # noqa: SIM117
        with TensorFiles(folder) as files:
            if is_open:
                files.read("a")
            if change == "replaced":
                shutil.copyfile(path, folder / "other")
                os.replace(folder / "other", path)
            else:
                with path.open("r+b") as file:
                    file.seek(-4, os.SEEK_END)
                    file.write(b"\0" * (8 if change == "grown" else 4))
                os.utime(path, ns=(1, 1))  # clocks of file systems are coarse
            files.read("b")


def test_a_removed_or_unreadable_file_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TensorFiles(folder) as files:
        (folder / "model.safetensors").rename(folder / "gone")
        with pytest.raises(CorruptCheckpoint, match="tensor b cannot be read: No such file"):
            files.read("b")
        (folder / "gone").rename(folder / "model.safetensors")

        def failing(*arguments: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(reading.os, "preadv", failing)
        with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: tensor b cannot be read: Input/output error"):
            files.read("b")


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_OPEN", 3)
    for i in range(1, 8):
        save_file({f"t{i}": torch.full((50,), float(i))}, tmp_path / f"model-{i:05d}-of-00007.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.warns(match=r"no model.safetensors.index.json"), TensorFiles(tmp_path) as files:
        for i in (1, 2, 3, 4, 5, 6, 7, 1, 4):
            assert bool((files.read(f"t{i}") == i).all())
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_file_is_read_whole(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert torch.equal(read_tensors(path)["b"], torch.ones(300, 30))


@pytest.fixture
def cuts_at_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the file of the tensor that is read next, after so many others, cut in the middle of the tensor."""

    def arm(number: int) -> None:
        count = 0
        read_into = FileReader.read_into

        def counting(self: FileReader, info: TensorInfo, start: int, bytes_B: torch.Tensor) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.truncate(info.file, (start + info.end) // 2)
            read_into(self, info, start, bytes_B)

        monkeypatch.setattr(FileReader, "read_into", counting)

    return arm


WHOLE: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda source, out: load_model(source),
    "quantize": lambda source, out: quantize_folder(
        source, out, policy=QuantPolicy(QuantScheme("int4-g16", 4, 16), None)
    ),
    "convert": lambda source, out: export_gguf(source, out, kind="bf16", tokenizer_keys={}),
}


@pytest.mark.parametrize("number", [1, 20])
@pytest.mark.parametrize("work", WHOLE)
def test_work_on_a_file_that_is_cut_ends_with_its_name(
    tmp_path: Path, cuts_at_read: Callable[[int], None], work: str, number: int
) -> None:
    source = folder_of(tmp_path / "m")
    cuts_at_read(number)
    with pytest.raises(CorruptCheckpoint, match=r"\.safetensors: truncated while tensor [a-z0-9_.]+ was read"):
        WHOLE[work](source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_packed_weights_of_a_file_that_is_cut(tmp_path: Path, cuts_at_read: Callable[[int], None]) -> None:
    packed_folder(tmp_path / "m", FORMS[0])
    cuts_at_read(20)
    with pytest.raises(CorruptCheckpoint, match="truncated while tensor"):
        load_model(tmp_path / "m")


def test_verify_lists_a_file_that_is_cut(tmp_path: Path, cuts_at_read: Callable[[int], None]) -> None:
    source = tiny_folder(tmp_path / "m")
    cuts_at_read(3)
    assert "truncated while tensor" in str(examine(source).problems[0])


def test_a_gguf_file_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "m")
    path = tmp_path / "m.gguf"
    export_gguf(source, path, kind="bf16", tokenizer_keys={})
    size = path.stat().st_size

    def cut_and_read(given: Path) -> object:
        found = read_gguf(given)
        os.truncate(path, size - 3000)
        return found

    monkeypatch.setattr("qnext.checkpoint.gguf.read.read_gguf", cut_and_read)
    with pytest.raises(CorruptCheckpoint, match=r"m.gguf: tensor [a-z0-9_.]+: truncated while it was read"):
        import_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_header_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    export_gguf(folder_of(tmp_path / "m"), path, kind="bf16", tokenizer_keys={})
    size = os.stat_result((0o100644, 0, 0, 1, 0, 0, path.stat().st_size, 0, 0, 0))
    os.truncate(path, 500)
    monkeypatch.setattr("qnext.checkpoint.gguf.container.os.fstat", lambda descriptor: size)
    with pytest.raises(CorruptCheckpoint, match=r"m.gguf: .*: truncated while its header was read"):
        read_gguf(path)
