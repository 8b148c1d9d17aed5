"""Models in several files: which belong together, and what is said where one is missing or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from qnext.checkpoint.gguf import export_gguf, find_gguf, import_gguf, read_gguf
from qnext.checkpoint.gguf.container import Value
from qnext.errors import CorruptCheckpoint, ModelNotFound, NotSupported, UsageError

from .files import arrays_of, write_arrays
from .test_convert import KEYS, assert_same, folder_of, tensors_of

NAME = "m-{:05d}-of-{:05d}.gguf"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    export_gguf(folder_of(root / "m", "dense"), root / "m.gguf", kind="f32", tokenizer_keys=KEYS)
    return root / "m.gguf"


def split(plain: Path, folder: Path, count: int, *, has_empty_first: bool = False, **changes: Value) -> list[Path]:
    """As llama-gguf-split does: keys in the first part alone, which may hold no tensor."""
    folder.mkdir(exist_ok=True)
    arrays = arrays_of(plain)
    names = np.array_split(list(arrays), count - has_empty_first)
    pieces: Sequence[Any] = [[], *names] if has_empty_first else names
    paths = []
    for i, piece in enumerate(pieces):
        keys: dict[str, Value] = dict(read_gguf(plain).keys) if i == 0 else {}
        keys |= {"split.no": i, "split.count": count, "split.tensors.count": len(arrays), **changes}
        path = folder / NAME.format(i + 1, count)
        paths.append(write_arrays(path, keys, {name: arrays[name] for name in piece}))
    return paths


@pytest.mark.parametrize("has_empty_first", [False, True])
def test_any_part_stands_for_all(plain: Path, tmp_path: Path, has_empty_first: bool) -> None:
    paths = split(plain, tmp_path / "s", 3, has_empty_first=has_empty_first)
    whole = read_gguf(plain)
    for path in paths:
        file = read_gguf(path)
        assert file.path == paths[0]
        assert file.keys.keys() - whole.keys.keys() == {"split.no", "split.count", "split.tensors.count"}
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
            name: tensor.shape for name, tensor in whole.tensors.items()
        }
    calls: list[tuple[int, int]] = []
    import_gguf(paths[2], tmp_path / "split", progress=lambda done, total: calls.append((done, total)))
    import_gguf(plain, tmp_path / "whole")
    assert_same(tensors_of(tmp_path / "split"), tensors_of(tmp_path / "whole"))
    assert calls[-1][0] == calls[-1][1]


def test_the_reference_splits_alike(plain: Path, tmp_path: Path) -> None:
    """What the package's own writer makes of a model in several files."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3", split_max_tensors=5)
    for field in gguf.GGUFReader(plain).fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind)
    for name, array in arrays_of(plain).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("m-*.gguf"))
    assert len(paths) > 2
    assert list(read_gguf(paths[-1]).tensors) == list(read_gguf(plain).tensors)


def test_links_into_another_folder(plain: Path, tmp_path: Path) -> None:
    """As the hub's cache keeps files: parts are looked for where the link is."""
    (tmp_path / "links").mkdir()
    for i, path in enumerate(split(plain, tmp_path / "s", 2)):
        (tmp_path / "links" / path.name).symlink_to(path.rename(tmp_path / "s" / f"blob{i}"))
    assert read_gguf(tmp_path / "links" / NAME.format(2, 2)).tensors.keys() == read_gguf(plain).tensors.keys()


def test_a_split_into_one_part_is_a_file(plain: Path, tmp_path: Path) -> None:
    for count in (0, 1):
        keys = {**read_gguf(plain).keys, "split.no": 0, "split.count": count}
        path = write_arrays(tmp_path / f"any-name-{count}.gguf", keys, arrays_of(plain))
        assert read_gguf(path).tensors.keys() == read_gguf(plain).tensors.keys()


def test_missing_parts_are_named(plain: Path, tmp_path: Path) -> None:
    paths = split(plain, tmp_path, 8)
    for path in paths[1:7]:
        path.unlink()
    shown = ", ".join(NAME.format(i, 8) for i in range(2, 7))
    for path in (paths[0], paths[7]):
        with pytest.raises(CorruptCheckpoint, match=re.escape(f"{tmp_path}: {shown} and 1 more missing, 6 of 8 parts")):
            read_gguf(path)


WRONG: dict[str, tuple[dict[str, Value], str]] = {
    "number": ({"split.no": 0}, r"m-00002-of-00003.gguf: key split.no: 0, where 1 belongs"),
    "tensors": ({"split.tensors.count": 99}, r"m-00001-of-00003.gguf: key split.tensors.count: 99, the 3 parts hold"),
    "count": ({"split.count": 4}, "m-00001-of-00003.gguf: key split.count: 4, the name says 3"),
    "too many": ({"split.count": 60_000}, "m-00001-of-00003.gguf: key split.count: 60000 parts, at most"),
    "text": ({"split.count": "3"}, "m-00001-of-00003.gguf: key split.count: must be a whole number, at least 0, not 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_contradict(plain: Path, tmp_path: Path, name: str) -> None:
    changes, message = WRONG[name]
    paths = split(plain, tmp_path, 3, **changes)
    with pytest.raises(CorruptCheckpoint, match=message):
        read_gguf(paths[0])


def test_parts_of_different_models(plain: Path, tmp_path: Path) -> None:
    paths = split(plain, tmp_path, 2)
    first = paths[0].read_bytes()
    arrays = arrays_of(plain)
    write_arrays_over(paths[1], {"split.no": 1, "split.count": 2}, {next(iter(arrays)): next(iter(arrays.values()))})
    with pytest.raises(CorruptCheckpoint, match=r"m-00002-of-00002.gguf: tensor token_embd.weight is in m-00001-of"):
        read_gguf(paths[0])
    split(plain, tmp_path / "three", 3)[1].replace(tmp_path / "x")
    paths[1].unlink()
    (tmp_path / "x").rename(paths[1])
    with pytest.raises(CorruptCheckpoint, match=r"m-00002-of-00002.gguf: key split.count: 3, where 2 belongs"):
        read_gguf(paths[0])
    assert paths[0].read_bytes() == first


def write_arrays_over(path: Path, keys: dict[str, Value], arrays: dict[str, np.ndarray]) -> None:
    path.unlink()
    write_arrays(path, keys, arrays)


def test_a_part_that_is_cut_is_named(plain: Path, tmp_path: Path) -> None:
    paths = split(plain, tmp_path, 3)
    raw = paths[1].read_bytes()
    paths[1].write_bytes(raw[:-100])
    with pytest.raises(CorruptCheckpoint, match=rf"m-00002-of-00003.gguf: truncated: {len(raw) - 100} of \d+ bytes"):
        read_gguf(paths[0])


# --- what a name stands for -----------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF")


def test_a_folder_or_a_pattern_stands_for_its_model(tmp_path: Path) -> None:
    touch(tmp_path / "one", "a-Q4_K_M.gguf", "mmproj-a-F16.gguf", "imatrix.gguf", "mtp-a.gguf", "config.json")
    touch(tmp_path / "split", NAME.format(2, 2), NAME.format(1, 2), "README.md")
    assert find_gguf(str(tmp_path / "one")) == tmp_path / "one" / "a-Q4_K_M.gguf"
    assert find_gguf(str(tmp_path / "split")) == tmp_path / "split" / NAME.format(1, 2)
    assert find_gguf(str(tmp_path / "*" / "*q4_k_m*").replace("q4_k_m", "Q4_K_M")) == tmp_path / "one" / "a-Q4_K_M.gguf"
    assert find_gguf(str(tmp_path / "split" / NAME.format(2, 2))) == tmp_path / "split" / NAME.format(2, 2)
    touch(tmp_path / "none", "model.safetensors")
    assert find_gguf(str(tmp_path / "none")) is None
    assert find_gguf("organisation/model") is None


def test_a_choice_is_the_user_s(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a-Q{i}_0.gguf" for i in range(7)), NAME.format(1, 2), NAME.format(2, 2))
    with pytest.raises(UsageError, match=r"8 GGUF models: a-Q0_0.gguf, .*a-Q4_0.gguf and 3 more; name one"):
        find_gguf(str(tmp_path))
    assert find_gguf(str(tmp_path / "*Q3*")) == tmp_path / "a-Q3_0.gguf"


def test_a_file_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"m.gguf: no such file$"):
        find_gguf(str(tmp_path / "m.gguf"))
    touch(tmp_path, NAME.format(1, 2), NAME.format(2, 2))
    with pytest.raises(ModelNotFound, match=r"m.gguf: no such file; there is .*m-00001-of-00002.gguf"):
        find_gguf(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("end", ["part1of2", "part2of2", "split-a", "split-bb", "part-01", "001"])
def test_pieces_that_were_cut_by_bytes(tmp_path: Path, end: str) -> None:
    mark = "-" if end.startswith("split") else "."
    touch(tmp_path, f"m.Q6_K.gguf{mark}{end}")
    with pytest.raises(NotSupported, match=rf"m.Q6_K.gguf{mark}{end}: a piece of a file .* cat .*m.Q6_K.gguf\?\* > "):
        find_gguf(str(tmp_path / f"m.Q6_K.gguf{mark}{end}"))
