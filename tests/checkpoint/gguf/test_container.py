"""The container against the reference implementation, and against files that lie."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.checkpoint.gguf.block_types import BLOCK_TYPES, REFUSED_TYPES
from qnext.checkpoint.gguf.container import GgufSpec, Value
from qnext.checkpoint.gguf.parts import read_gguf
from qnext.checkpoint.gguf.writer import GgufWriter, new_file
from qnext.errors import CorruptCheckpoint, NotSupported, QnextError, QnextWarning, UsageError

from .files import small_file


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_file(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def test_block_types_are_those_of_ggml() -> None:
    for block in BLOCK_TYPES.values():
        if block.name == "Q2_0":  # newer than the released package: ggml.h 42, ggml-common.h block_q2_0
            assert block[1:] == (42, 64, 2 + 64 // 4)
            continue
        kind = gguf.GGMLQuantizationType[block.name]
        assert (block.number, (block.num_items, block.num_bytes)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    file = read_gguf(small_file(tmp_path / "small.gguf"))
    assert file.keys == {
        "general.architecture": "qwen3",
        "a.count": 7,
        "a.long": 2**40,
        "a.small": -3,
        "a.number": 0.5,
        "a.precise": 0.1,
        "a.truth": True,
        "a.text": "Grüße",
        "a.texts": ["x", "", "yz"],
        "a.numbers": [1, -2, 3],
        "a.truths": [True, False],
    }
    reference = gguf.GGUFReader(file.path)
    raw = file.path.read_bytes()
    assert [tensor.name for tensor in reference.tensors] == list(file.tensors)
    for theirs in reference.tensors:
        ours = file.tensors[theirs.name]
        assert ours.block.name == theirs.tensor_type.name
        assert list(ours.shape) == [int(size) for size in reversed(theirs.shape)]
        assert raw[ours.start : ours.end] == theirs.data.tobytes()


def test_the_reference_reads_what_is_written(tmp_path: Path) -> None:
    keys: dict[str, Value] = {
        "general.architecture": "qwen3",
        "n": 3,
        "x": 0.25,
        "yes": True,
        "ids": [1, -2],
        "names": ["ä", ""],
        "truths": [False, True],
        "none": [],
    }
    specs = {"a": GgufSpec(BLOCK_TYPES["F32"], (3,)), "b.weight": GgufSpec(BLOCK_TYPES["Q4_0"], (2, 3, 32))}
    values = np.random.default_rng(0).standard_normal((6, 32), dtype=np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    with new_file(tmp_path / "a.gguf") as file:
        writer = GgufWriter(file, keys, specs)
        writer.write("a", [np.arange(3, dtype=np.float32).tobytes()])
        writer.write("b.weight", [packed[:1].tobytes(), packed[1:].tobytes()])
        writer.finish()
    reference = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {name: field.contents() for name, field in reference.fields.items() if name in keys} == keys
    a, b = reference.tensors
    assert (a.data == np.arange(3)).all()
    assert list(b.shape) == [32, 3, 2]
    assert (b.data.reshape(6, 18) == packed).all()
    assert read_gguf(tmp_path / "a.gguf").keys == keys


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.gguf"
    with pytest.raises(RuntimeError), new_file(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert not target.parent.exists()
    with new_file(target) as file:
        file.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(UsageError, match="exists"), new_file(target):
        pass
    assert [path.name for path in target.parent.iterdir()] == ["a.gguf"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_number_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="big: 4294967296"), new_file(tmp_path / "a") as file:
        GgufWriter(file, {"big": 2**32}, {})


# --- files that lie -------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(keys: list[bytes], tensors: list[bytes], data: int = 0, **fields: int) -> bytes:
    counts = struct.pack(
        "<IQQ", fields.get("version", 3), fields.get("num_tensors", len(tensors)), fields.get("num_keys", len(keys))
    )
    raw = b"GGUF" + counts + b"".join(keys) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32) + bytes(data)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file, it is empty"),
    "another format": (b"RIFF" + bytes(40), "no GGUF file, it begins with b'RIFF"),
    "page": (b"\n<!DOCTYPE html><html>Not found", "no GGUF file but a page of HTML"),
    "answer": (b'{"error": "Unauthorized"}', "no GGUF file but JSON text"),
    "no entry": (b"Entry not found", "the answer of a hub that has no such file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a git-lfs pointer"),
    "zeros": (bytes(4096), "no GGUF file but zeros"),
    "first bytes": (b"GGUF\3\0\0\0", "truncated: no GGUF file has only 8 bytes"),
    "count of keys": (header([], [], 40, num_keys=2**63), "9223372036854775808 keys and 0 tensors do not fit"),
    "count of tensors": (header([], [], 40, num_tensors=2**60), "tensors do not fit into"),
    "more keys than there are": (header([key("a", 4, bytes(4))], [], 64, num_keys=3), "key number 2"),
    "length of a name": (header([struct.pack("<Q", 2**62) + bytes(8)], []), "a name of 4611686018427387904 bytes"),
    "name of nothing": (header([key("", 4, bytes(4))], []), "'' is not the name of a key"),
    "name with a bell": (header([key("a\a", 4, bytes(4))], []), "is not the name of a key"),
    "length of a text": (header([key("a", 8, struct.pack("<Q", 2**63))], []), "in its header: 9223372036854775853"),
    "not UTF-8": (header([key("a", 8, struct.pack("<Q", 1) + b"\xff")], []), "key a: text that is not UTF-8"),
    "value type": (header([key("a", 13, bytes(8))], []), "key a: unknown value type 13"),
    "item type": (header([key("a", 9, struct.pack("<IQ", 99, 1) + bytes(8))], []), "key a: unknown value type 99"),
    "truth": (header([key("a", 7, b"\2")], []), "key a: a truth value that is neither"),
    "array length": (header([key("a", 9, struct.pack("<IQ", 0, 2**61))], []), "key a: an array of 2305843009213693952"),
    "key twice": (header([key("a", 4, bytes(4))] * 2, []), "key a: appears twice"),
    "no alignment": (header([key("general.alignment", 4, bytes(4))], []), "must be a power of two"),
    "odd alignment": (header([key("general.alignment", 4, b"\x30\0\0\0")], []), "must be a power of two"),
    "text as alignment": (header([key("general.alignment", 8, text("32"))], []), "must be a power of two"),
    "one of several": (header([key("split.count", 2, b"\2\0")], []), "one of 2 parts, but its name does not end"),
    "tensor twice": (header([], [tensor("a", (8,)), tensor("a", (8,), offset=32)], 64), "tensor a: appears twice"),
    "path as name": (header([], [tensor("../a", (8,))], 32), "is not a tensor name"),
    "no dimensions": (header([], [tensor("a", ())], 32), "tensor a: 0 dimensions"),
    "nine dimensions": (header([], [tensor("a", (1,) * 9)], 32), "tensor a: 9 dimensions"),
    "size of zero": (header([], [tensor("a", (8, 0))], 32), "does not fit type F32"),
    "sizes that overflow": (header([], [tensor("a", (2**33, 2**33))], 32), "is larger than any file"),
    "part of a block": (header([], [tensor("a", (33,), 8)], 64), r"shape \[33\] does not fit type Q8_0"),
    "beyond the end": (
        header([], [tensor("b", (8,)), tensor("a", (16,), offset=32)], 64),
        r"a.gguf: truncated: 160 of 192 bytes, from tensor a on; download it again",
    ),
    "overlap": (header([], [tensor("a", (16,)), tensor("b", (8,), offset=32)], 96), "tensor b: offset 32 overlaps"),
    "hole": (header([], [tensor("a", (8,), offset=32)], 64), "tensor a: offset 32 overlaps or leaves a hole"),
    "not aligned": (header([], [tensor("a", (8,), offset=4)], 64), "tensor a: offset 4 is not aligned"),
    "offset that overflows": (header([], [tensor("a", (8,), offset=2**64 - 32)], 32), "tensor a: offset"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name(tmp_path: Path, name: str) -> None:
    raw, message = LIES[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def nested(depth: int) -> bytes:
    """An array of one array of one array, and so on, of one byte."""
    return struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQ", 0, 1) + b"\7"


FOREIGN: dict[str, tuple[bytes, str]] = {
    "old version": (header([], [], version=1), "version 1 is not supported"),
    "new version": (header([], [], version=4), "version 4 is not supported"),
    "big-endian": (header([], [], version=3 << 24), "big-endian is not supported"),
    "activations": (header([], [tensor("a", (32,), 9)], 64), r"tensor a: type 9 \(Q8_1, which llama.cpp keeps for act"),
    "dropped": (header([], [tensor("a", (32,), 5)], 64), r"tensor a: type 5 \(Q4_3, a type that llama.cpp dropped"),
    "repacked": (header([], [tensor("a", (32,), 31)], 64), r"tensor a: type 31 \(Q4_0_4_4, "),
    "integers": (header([], [tensor("a", (8,), 26)], 64), r"tensor a: type 26 \(I32, integers\)"),
    "type to come": (header([], [tensor("a", (8,), 99)], 64), r"tensor a: type 99 \(unknown\) is not supported"),
    "deep arrays": (header([key("a", 9, nested(5))], [], 64), "key a: arrays inside arrays are read 4 deep"),
    "GGML": (b"lmgg" + bytes(60), "a GGML file from before GGUF"),
    "archive": (b"PK\3\4" + bytes(60), "a zip archive, as PyTorch writes"),
    "pickle": (b"\x80\2}q\0." + bytes(60), "a Python pickle"),
    "packed": (b"\x1f\x8b\x08" + bytes(60), "a gzip archive"),
    "safetensors": (struct.pack("<Q", 20) + b'{"a": {}}' + bytes(60), "a safetensors file"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_supported_is_not_called_damage(tmp_path: Path, name: str) -> None:
    raw, message = FOREIGN[name]
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(NotSupported, match=message) as caught:
        read_gguf(tmp_path / "a.gguf")
    assert str(tmp_path / "a.gguf") in str(caught.value)


def test_all_numbers_of_types_are_known() -> None:
    numbers = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    assert numbers.keys() <= REFUSED_TYPES.keys() | {block.number for block in BLOCK_TYPES.values()}
    for number, meaning in REFUSED_TYPES.items():
        assert meaning.split(",")[0] == numbers.get(number, meaning.split(",")[0])


def test_arrays_of_arrays(tmp_path: Path) -> None:
    """No key that is read is one; those of others do no harm."""
    (tmp_path / "a").write_bytes(header([key("a", 9, nested(3)), key("b", 9, nested(1))], []))
    assert read_gguf(tmp_path / "a").keys == {"a": [[[7]]], "b": [7]}


@pytest.mark.parametrize("version", [2, 3])
def test_bytes_after_the_last_tensor_are_passed_over(tmp_path: Path, version: int) -> None:
    (tmp_path / "a").write_bytes(header([], [tensor("a", (8,))], 64, version=version))
    with pytest.warns(QnextWarning, match="32 bytes after the last tensor are not read"):
        assert list(read_gguf(tmp_path / "a").tensors) == ["a"]


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_other_alignments(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3")
    writer.add_custom_alignment(alignment)
    for i in range(3):
        writer.add_tensor(f"t{i}", np.full(3 + i, i, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    raw = (tmp_path / "a.gguf").read_bytes()
    for i, found in enumerate(read_gguf(tmp_path / "a.gguf").tensors.values()):
        assert raw[found.start : found.end] == np.full(3 + i, i, dtype=np.float32).tobytes()


def test_the_smallest_sound_files(tmp_path: Path) -> None:
    """The lies above are lies for the reason that they name: what they are made of is sound."""
    for raw in (header([], []), header([key("a", 4, bytes(4))], [tensor("a", (8,))], 32)):
        (tmp_path / "a").write_bytes(raw)
        read_gguf(tmp_path / "a")


def refusal(path: Path, raw: bytes) -> QnextError | None:
    """The one error of ours with which a file is refused, or None where it is read. Its tensors lie inside it then."""
    path.write_bytes(raw)
    try:
        file = read_gguf(path)
    except QnextError as error:
        assert error.exit_code in (5, 6)
        assert str(path) in str(error)
        assert len(str(error)) < 1500 and len(str(error).splitlines()) == 1
        return error
    assert all(0 < tensor.start < tensor.end <= len(raw) for tensor in file.tensors.values())
    return None


def test_every_truncation_is_refused(tmp_path: Path, sound: bytes) -> None:
    for size in range(0, len(sound), 5):
        error = refusal(tmp_path / "a.gguf", sound[:size])
        if error is None:  # only what fills up the last tensor's place is gone
            assert len(sound) - size < 32
        else:
            assert isinstance(error, CorruptCheckpoint)


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
def test_every_byte_of_the_header_flipped(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "sound.gguf").write_bytes(sound)
    header_bytes = min(tensor.start for tensor in read_gguf(tmp_path / "sound.gguf").tensors.values())
    refused = 0
    for at in range(header_bytes):
        raw = bytearray(sound)
        raw[at] ^= (0x01, 0x80, 0xFF)[at % 3]
        refused += refusal(tmp_path / "a.gguf", bytes(raw)) is not None
    assert refused > header_bytes // 3  # the rest are letters and values


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
def test_no_number_makes_the_reader_ask_for_memory(tmp_path: Path, sound: bytes) -> None:
    """A long written over every place of the header: what is made of it stays near the size of the file."""
    (tmp_path / "sound.gguf").write_bytes(sound)
    header_bytes = min(tensor.start for tensor in read_gguf(tmp_path / "sound.gguf").tensors.values())
    tracemalloc.start()
    try:
        for at in range(header_bytes - 8):
            value = (2**31, 2**40, 2**63)[at % 3]
            refusal(tmp_path / "a.gguf", sound[:at] + struct.pack("<Q", value) + sound[at + 8 :])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_an_error_of_ours_or_none(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        change = data.draw(st.sampled_from(["byte", "long", "cut", "repeat"]))
        if change == "byte":
            raw[at] = data.draw(st.integers(0, 255))
        elif change == "long":
            value = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
            raw[at : at + 8] = struct.pack("<Q", value)
        elif change == "cut":
            del raw[at : at + data.draw(st.integers(1, 8))]
        else:
            raw[at:at] = raw[at : at + 16]
    refusal(tmp_path_factory.mktemp("fuzz") / "a.gguf", bytes(raw))
