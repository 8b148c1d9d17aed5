"""Folders as people have them: links, shards without an index, other files than safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qnext.checkpoint import load_model
from qnext.checkpoint.foreign import FOREIGN_FILES
from qnext.checkpoint.header import read_index
from qnext.checkpoint.resolve import resolve_model
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, QnextError, QnextWarning

from .folders import CONFIGS, edit_config, rewrite, shard_of, tiny_folder, tiny_model

INDEX = "model.safetensors.index.json"


def names_of(folder: Path) -> list[str]:
    return list(read_index(folder).tensors)


def _one_by_one(folder: Path, target: Path) -> None:
    """Each file of `folder` is a link to one of the same name in `target`."""
    target.mkdir()
    for path in list(folder.iterdir()):
        path.rename(target / path.name)
        path.symlink_to(os.path.relpath(target / path.name, folder))


def _absolute(folder: Path, target: Path) -> None:
    target.mkdir()
    for path in list(folder.glob("*.safetensors")):
        path.rename(target / path.name)
        path.symlink_to((target / path.name).absolute())


def _of_the_cache(folder: Path, target: Path) -> None:
    """The cache of the hub: snapshots/<commit>/<file> is a link to blobs/<hash>."""
    target.mkdir()
    for i, path in enumerate(list(folder.iterdir())):
        path.rename(target / f"{i:064x}")
        path.symlink_to(os.path.relpath(target / f"{i:064x}", folder))


def _of_a_volume(folder: Path, target: Path) -> None:
    """A projected volume: each file is a link through ..data, a link to the folder of a revision."""
    revision = folder / "..2026_01_01"
    revision.mkdir()
    (folder / "..data").symlink_to(revision.name)
    for path in [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]:
        path.rename(revision / path.name)
        path.symlink_to(f"..data/{path.name}")


def _chained(folder: Path, target: Path) -> None:
    _one_by_one(folder, target)
    _one_by_one(target, target.parent / "further")


def _the_folder(folder: Path, target: Path) -> None:
    folder.rename(target)
    folder.symlink_to(target)


@pytest.mark.parametrize("link", [_one_by_one, _absolute, _of_the_cache, _of_a_volume, _chained, _the_folder])
def test_links_are_followed(tmp_path: Path, link: object) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    link(folder, tmp_path / "elsewhere")  # type: ignore[operator]
    assert load_model(folder).config == CONFIGS["moe"]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    path = shard_of(folder, "model.norm.weight")
    path.unlink()
    path.symlink_to("/nowhere/blob")
    with pytest.raises(CorruptCheckpoint, match=rf"{path.name}: file is missing; it is a link to /nowhere/blob"):
        read_index(folder)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.symlink_to(tmp_path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: is no regular file"):
        read_index(tmp_path)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    """mlx-lm writes both."""
    folder = tiny_folder(tmp_path / "m", "moe", max_shard_bytes=1 << 30)
    expected = names_of(folder)
    weight_map = dict.fromkeys(expected, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert names_of(folder) == expected


def test_an_index_of_shards_that_are_gone_does_not_count(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    index = (folder / INDEX).read_text()
    rewrite(folder, lambda tensors: None)
    expected = names_of(folder)
    (folder / INDEX).write_text(index)
    assert names_of(folder) == expected


def test_a_single_file_beside_shards_is_unclear(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="holds both"):
        read_index(folder)


def test_shards_need_no_index_where_all_are_there(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    expected = names_of(folder)
    (folder / INDEX).unlink()
    with pytest.warns(QnextWarning, match=r"no model.safetensors.index.json; model-00001-of-\d+.safetensors to "):
        assert sorted(names_of(folder)) == sorted(expected)
    paths = sorted(folder.glob("*.safetensors"))
    paths[1].unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"{paths[1].name}: file is missing, and there is no index"):
        read_index(folder)
    paths[-1].unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"{paths[1].name}: .*; 2 of {len(paths)} files are missing"):
        read_index(folder)


@pytest.mark.parametrize("digits", [1, 3, 6])
def test_numbers_of_shards_may_have_other_widths(tmp_path: Path, digits: int) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    expected = names_of(folder)
    (folder / INDEX).unlink()
    paths = sorted(folder.glob("*.safetensors"))[:9]
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(folder / f"model-{i + 1:0{digits}d}-of-{len(paths):0{digits}d}.safetensors")
    with pytest.warns(QnextWarning, match="taken as the model"):
        assert sorted(names_of(folder)) == sorted(expected)


@pytest.mark.parametrize("name", ["config.json", INDEX, "quantize_config.json"])
def test_a_byte_order_mark_is_passed_over(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    path = folder / name
    block = b'{"quant_method": "fp8"}'
    path.write_bytes(b"\xef\xbb\xbf" + (path.read_bytes() if path.exists() else block))
    assert load_model(folder).config == tiny_model("moe").config


def test_an_empty_quantization_config_is_absent(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe")
    edit_config(folder, quantization_config={})
    assert load_model(folder).config == tiny_model("moe").config


def test_one_file_may_have_any_name(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "moe", max_shard_bytes=1 << 30)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.warns(QnextWarning, match=r"weights.safetensors taken as the model"):
        load_model(folder)
    save_file({"a": torch.zeros(1)}, folder / "more.safetensors")
    with pytest.raises(ModelNotFound, match=r"neither model.safetensors nor"):
        read_index(folder)


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "next")
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths[2:5]:
        path.unlink()
    with pytest.raises(CorruptCheckpoint) as caught:
        read_index(folder)
    assert str(caught.value).startswith(f"{paths[2]}: file is missing, named by {INDEX}")
    assert str(caught.value).endswith(f"; 3 of {len(paths)} files are missing")
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/x.incomplete").write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match="its download is not complete"):
        read_index(folder)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 3999975056\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=r"model.safetensors: is a pointer of git-lfs.*git lfs pull"):
        read_index(tmp_path)


FOREIGN: dict[str, tuple[list[str], type[QnextError], str]] = {
    "empty": ([], ModelNotFound, "is an empty folder"),
    "config alone": (["config.json"], ModelNotFound, "neither model.safetensors nor"),
    "pickle": (["config.json", "pytorch_model.bin"], NotSupported, "pytorch_model.bin: pickle"),
    "pickles": (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], NotSupported, "and 1 more"),
    "torch": (["model.pt"], NotSupported, "model.pt: pickle"),
    "consolidated": (["consolidated.00.pth", "params.json"], NotSupported, "consolidated.00.pth"),
    "consolidated safetensors": (["consolidated.safetensors"], NotSupported, "another layout"),
    "GGUF": (["m-Q4_K_M.gguf", "config.json"], NotSupported, "`qnext convert FILE.gguf OUT`"),
    "mlx": (["weights.npz", "config.json"], NotSupported, "mlx's arrays"),
    "ONNX": (["model.onnx"], NotSupported, "model.onnx: ONNX"),
    "OpenVINO": (["openvino_model.xml", "openvino_model.bin"], NotSupported, "openvino_model.bin"),
    "Flax": (["flax_model.msgpack"], NotSupported, "Flax"),
    "distributed": (["__0_0.distcp", ".metadata"], NotSupported, "a distributed checkpoint of torch"),
    "download": (["config.json", "a.safetensors.incomplete"], CorruptCheckpoint, "its download is not complete"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_folders_are_called_by_name(tmp_path: Path, name: str) -> None:
    files, kind, words = FOREIGN[name]
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(kind) as caught:
        read_index(tmp_path)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-0.6B"}))
    with pytest.raises(NotSupported, match=r"a PEFT adapter of Qwen/Qwen3-0.6B is not supported; merge it"):
        read_index(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(NotSupported, match="a PEFT adapter is not supported"):
        read_index(tmp_path)


@pytest.mark.parametrize("pattern", FOREIGN_FILES)
def test_each_foreign_file_is_refused_with_advice(tmp_path: Path, pattern: str) -> None:
    (tmp_path / pattern.replace("*", "x")).write_bytes(b"x")
    with pytest.raises(NotSupported, match=r"is not supported; \S+"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("m.gguf", NotSupported, "`qnext convert .*m.gguf OUT`"),
        ("model.bin", NotSupported, "`qnext convert .*model.bin OUT`"),
        ("model.safetensors", ModelNotFound, "a model is a folder"),
        ("notes.txt", ModelNotFound, "a model is a folder"),
    ],
)
def test_a_file_is_no_folder(tmp_path: Path, name: str, kind: type[QnextError], words: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" if kind is NotSupported else b"text")
    with pytest.raises(kind, match=words):
        resolve_model(tmp_path / name)
