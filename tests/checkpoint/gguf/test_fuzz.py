"""A sound model file, damaged anywhere in its header: every step of an import succeeds or names what is wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.checkpoint.gguf import export_gguf, import_gguf, read_gguf
from qnext.errors import QnextError
from qnext.text.gguf import vocabulary_keys, write_vocabulary
from qnext.text.train import byte_level_tokenizer, save_tokenizer

from .files import GGUF_CONFIGS
from .test_convert import folder_of

NUMBERS = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The file and the size of its header."""
    root = tmp_path_factory.mktemp("fuzz")
    save_tokenizer(byte_level_tokenizer(), root / "t", model_max_length=64)
    keys = vocabulary_keys(root / "t", num_rows=GGUF_CONFIGS["next"].vocab_size)
    export_gguf(folder_of(root / "m"), root / "m.gguf", kind="q8_0", tokenizer_keys=keys)
    start = min(tensor.start for tensor in read_gguf(root / "m.gguf").tensors.values())
    return (root / "m.gguf").read_bytes(), start


def attempt(path: Path, work: Path) -> None:
    file = read_gguf(path)
    write_vocabulary(file.keys, work / "t", source=str(path), model_max_length=64)
    import_gguf(path, work / "out", dtype=torch.bfloat16, tokenizer_folder=work / "t")


def test_the_undamaged_file_is_taken(exported: tuple[bytes, int], tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(exported[0])
    attempt(tmp_path / "m.gguf", tmp_path)


@pytest.mark.filterwarnings("ignore::qnext.errors.QnextWarning")
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_named(
    exported: tuple[bytes, int], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw, header_bytes = bytearray(exported[0]), exported[1]
    # keys of the architecture come first, the tensors last; the vocabulary between them is long
    ends = st.one_of(st.integers(0, 2500), st.integers(header_bytes - 6500, header_bytes - 8))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(ends, st.integers(0, len(raw) - 8)))
        match data.draw(st.sampled_from(["byte", "word", "long"])):
            case "byte":
                raw[at] = data.draw(st.integers(0, 255))
            case "word":
                raw[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from(NUMBERS[:9])))
            case _:
                raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from(NUMBERS)))
    work = tmp_path_factory.mktemp("fuzz")
    (work / "m.gguf").write_bytes(raw)
    try:
        attempt(work / "m.gguf", work)
    except QnextError as error:
        assert error.exit_code in (5, 6)
        assert len(str(error)) < 1500 and len(str(error).splitlines()) == 1
        assert not (work / "out").exists()
