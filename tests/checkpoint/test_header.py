"""Files that lie about themselves are refused, and the message names file and tensor."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qnext.checkpoint.files import ShardWriter, TensorFiles, TensorSpec
from qnext.checkpoint.header import read_header, read_index
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported

from .folders import shard_of, tiny_folder, write_file


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS = {
    "hole": ({"a": _entry(), "b": _entry(offsets=(12, 20))}, 20, "tensor b leaves a hole"),
    "hole at the start": ({"a": _entry(offsets=(4, 12))}, 12, "tensor a leaves a hole"),
    "overlap": ({"a": _entry(), "b": _entry(offsets=(4, 12))}, 12, "tensor b overlaps"),
    "same bytes twice": ({"a": _entry(), "b": _entry()}, 8, "tensor b overlaps"),
    "out of range": ({"a": _entry(shape=(200,), offsets=(0, 800))}, 8, "truncated inside tensor a"),
    "trailing bytes": ({"a": _entry()}, 9, "1 bytes after the last tensor"),
    "reversed offsets": ({"a": _entry(offsets=(8, 0))}, 8, "tensor a: bad data_offsets"),
    "negative offset": ({"a": _entry(offsets=(-8, 0))}, 8, "tensor a: bad data_offsets"),
    "three offsets": ({"a": _entry(offsets=(0, 4, 8))}, 8, "tensor a: bad data_offsets"),
    "size against shape": ({"a": _entry(shape=(3,))}, 8, "needs 12 bytes, its offsets span 8"),
    "huge shape": ({"a": _entry(shape=(2**40, 2**40))}, 8, "tensor a: F32"),
    "negative shape": ({"a": _entry(shape=(-1, -2))}, 8, "tensor a: bad shape"),
    "shape with true": ({"a": _entry(shape=(True, 2))}, 8, "tensor a: bad shape"),
    "shape is text": ({"a": _entry(shape="2")}, 8, "tensor a: bad shape"),
    "unknown dtype": ({"a": _entry(dtype="X64", shape=(1,))}, 8, "dtype 'X64' is not supported"),
    "dtype is a list": ({"a": _entry(dtype=["F32"])}, 8, "is not supported"),  # type: ignore[arg-type]
    "extra key": ({"a": {**_entry(), "x": 1}}, 8, "needs exactly"),
    "no object": ({"a": 3}, 8, "needs exactly"),
    "path": ({"../a": _entry()}, 8, "'../a' is not a tensor name"),
    "absolute path": ({"/etc/a": _entry()}, 8, "is not a tensor name"),
    "backslash": ({"c\\a": _entry()}, 8, "is not a tensor name"),
    "terminal escape": ({"\x1b[2J": _entry()}, 8, "is not a tensor name"),
    "empty name": ({"": _entry()}, 8, "is not a tensor name"),
    "metadata": ({"__metadata__": {"a": 1}, "a": _entry()}, 8, "__metadata__"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header(tmp_path: Path, name: str) -> None:
    header, num_bytes, message = BAD_HEADERS[name]
    path = write_file(tmp_path / "m.safetensors", json.dumps(header), bytes(num_bytes))
    with pytest.raises(CorruptCheckpoint) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


BAD_BYTES = {
    "empty file": (b"", "truncated inside its header"),
    "seven bytes": (b"1234567", "truncated inside its header"),
    "header beyond the file": (struct.pack("<Q", 50) + b"{}", "truncated inside its header"),
    "length of 2^64 - 1": (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated inside its header"),
    "no JSON": (struct.pack("<Q", 3) + b"abc", "not readable as JSON"),
    "not UTF-8": (struct.pack("<Q", 3) + b'{"\xff', "not readable as JSON"),
    "UTF-16": (struct.pack("<Q", 4) + "{}".encode("utf-16-le"), "not readable as JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "must hold a JSON object"),
    "deep nesting": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not readable as JSON"),
    "long integer": (struct.pack("<Q", 10_005) + b'{"a":' + b"9" * 9_999 + b"}", "not readable as JSON"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_bytes(tmp_path: Path, name: str) -> None:
    raw, message = BAD_BYTES[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=message):
        read_header(path)


def test_duplicate_keys(tmp_path: Path) -> None:
    entry = json.dumps(_entry())
    path = write_file(tmp_path / "m.safetensors", f'{{"a": {entry}, "a": {entry}}}', bytes(8))
    with pytest.raises(CorruptCheckpoint, match="key 'a' appears twice"):
        read_header(path)
    inner = '{"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}'
    path = write_file(tmp_path / "m.safetensors", f'{{"a": {inner}}}', bytes(8))
    with pytest.raises(CorruptCheckpoint, match="key 'dtype' appears twice"):
        read_header(path)


def test_header_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(CorruptCheckpoint, match="at most 100000000"):
        read_header(path)


def test_empty_tensors_are_allowed_between_others(tmp_path: Path) -> None:
    header = {"a": _entry(), "e": _entry(shape=[0, 4], offsets=[8, 8]), "b": _entry(offsets=[8, 16])}
    path = write_file(tmp_path / "m.safetensors", json.dumps(header), bytes(16))
    assert list(read_header(path)) == ["a", "e", "b"]


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/tmp/x.safetensors",
        "a/b.safetensors",
        "..",
        "c:x.safetensors",
        ".x.safetensors",
        "x.bin",
        "",
        3,
        None,
        "x\n.safetensors",
        "a\\b.safetensors",
    ],
)
def test_index_names_only_files_of_the_folder(tmp_path: Path, shard: object) -> None:
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CorruptCheckpoint, match=r"tensor a: .* is not the name of a file in the folder"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{", '{"weight_map": 1}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=r"index\.json"):
        read_index(tmp_path)


def test_index_with_a_duplicate(tmp_path: Path) -> None:
    text = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match="key 'a' appears twice"):
        read_index(tmp_path)


def _edit_index(folder: Path, **changes: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    path.write_text(json.dumps(index))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    name = "model.norm.weight"
    home = shard_of(folder, name)
    other = next(path.name for path in folder.glob("*.safetensors") if path != home)
    _edit_index(folder, **{name: other})
    with pytest.raises(CorruptCheckpoint, match=rf"{home.name}: tensor {name} is here, but .* places it in {other}"):
        read_index(folder)
    _edit_index(folder, **{name: None})
    with pytest.raises(CorruptCheckpoint, match=f"tensor {name} is here, but .* does not name it"):
        read_index(folder)
    _edit_index(folder, **{name: home.name, "model.ghost": home.name})
    with pytest.raises(CorruptCheckpoint, match=rf"{home.name}: tensor model.ghost is missing"):
        read_index(folder)
    _edit_index(folder, **{"model.ghost": "nowhere.safetensors"})
    with pytest.raises(CorruptCheckpoint, match=r"nowhere.safetensors: file is missing, named by"):
        read_index(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensor = {"a": torch.zeros(2)}
    save_file(tensor, tmp_path / "x.safetensors")
    save_file({**tensor, "b": torch.ones(1)}, tmp_path / "y.safetensors")
    weight_map = {"a": "x.safetensors", "b": "y.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=r"y.safetensors: tensor a is here, but .* places it in x"):
        read_index(tmp_path)


def test_truncated_shard_names_file_and_tensor(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    name = "model.norm.weight"
    path = shard_of(folder, name)
    last = list(read_header(path))[-1]
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(CorruptCheckpoint, match=rf"{path.name}: truncated inside tensor {last} "):
        read_index(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        read_index(tmp_path / "nothing")


def test_a_dtype_of_the_format_that_is_not_read_is_no_damage(tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.safetensors", json.dumps({"a": _entry(dtype="C64", shape=(1,))}), bytes(8))
    with pytest.raises(NotSupported, match=r"m.safetensors: tensor a: dtype C64 is not supported"):
        read_header(path)


def test_our_shards_are_read_by_the_formats_library(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3).to(torch.bfloat16),
        "wide": torch.randn(5, 3),
        "half": torch.randn(7).to(torch.float16),
        "byte": torch.randn(5, 2).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(5),
    }
    plan = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = ShardWriter(tmp_path, plan)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with TensorFiles(tmp_path) as files:
        ours = {name: files.read(name) for name in files.tensors}
        for name, tensor in tensors.items():
            for found in (theirs[name], ours[name]):
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    header = {"a": _entry("F8_E4M3", [1], [0, 1]), "b": _entry("F32", [2], [1, 9])}
    values = torch.tensor([1.5, -2.0])
    write_file(tmp_path / "model.safetensors", json.dumps(header), b"\0" + values.numpy().tobytes())
    with TensorFiles(tmp_path) as files:
        assert torch.equal(files.read("b"), values)


def test_shards_are_filled_and_indexed(tmp_path: Path) -> None:
    plan = {f"t{i}": TensorSpec(torch.float32, (i + 1,)) for i in range(6)}
    writer = ShardWriter(tmp_path, plan, max_shard_bytes=24)
    for name, spec in plan.items():
        writer.write(name, torch.full(spec.shape, float(name[1:])))
    writer.finish()
    sizes = [
        sum(info.num_bytes for info in read_header(path).values()) for path in sorted(tmp_path.glob("*.safetensors"))
    ]
    assert sizes == [4 + 8 + 12, 16, 20, 24]
    index = read_index(tmp_path)
    assert index.tensors.keys() == plan.keys()
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 84


def test_a_tensor_stays_when_others_are_read(tmp_path: Path) -> None:
    values = torch.randn(9000)
    save_file({"a": values, "b": values + 1}, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as files:
        first = files.read("a")
        assert torch.equal(files.read("b"), values + 1)
        assert [torch.equal(piece, values + 1) for piece in files.pieces("b")] == [True]
        assert torch.equal(first, values)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_headers_never_escape(tmp_path: Path, data: st.DataObject) -> None:
    """Any change of a header is either harmless or named; no other error gets out."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.float16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789{}[]",:.-eE')))
    path.write_bytes(bytes(raw[: data.draw(st.integers(len(raw) - 40, len(raw)))]))
    try:
        infos = read_header(path).values()
    except CorruptCheckpoint as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert sum(info.num_bytes for info in infos) + int.from_bytes(raw[:8], "little") + 8 == path.stat().st_size


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was(tmp_path: Path, was_enabled: bool) -> None:
    """Also where reading ends in an error."""
    try:
        (gc.enable if was_enabled else gc.disable)()
        with pytest.raises(ModelNotFound):
            read_index(tmp_path)
        assert gc.isenabled() is was_enabled
        read_index(tiny_folder(tmp_path / "m", "dense"))
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
