"""Tokenizers and small files whose numbers or sizes would make tables that nobody can hold."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qnext.config.hf import load_config_json
from qnext.errors import CorruptCheckpoint
from qnext.text import files as files_module
from qnext.text.tokenizer import Tokenizer
from qnext.text.tokenizer_files import MAX_TOKEN_IDS
from qnext.text.train import byte_level_tokenizer, save_tokenizer

Description = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(byte_level_tokenizer(), tmp_path, model_max_length=128)
    return tmp_path


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """A table that is as long as an id does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _edit(folder: Path, change: Callable[[Description], object], name: str = "tokenizer.json") -> None:
    path = folder / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _vocab(index: int) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, lambda d: d["model"]["vocab"].update({"zz": index}))


def _added_file(index: object) -> Callable[[Path], None]:
    return lambda folder: (folder / "added_tokens.json").write_text(json.dumps({"<new>": index})) and None


def _decoder(folder: Path) -> None:
    entry = {"content": "<new>", "special": True}
    _edit(folder, lambda d: d["added_tokens_decoder"].update({"2147483647": entry}), "tokenizer_config.json")


def _vocab_file(folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({**vocab, "zz": 2**31 - 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


HUGE: dict[str, Callable[[Path], None]] = {
    "vocabulary": _vocab(2**31 - 1),
    "vocabulary, the first that is too large": _vocab(MAX_TOKEN_IDS),
    "beyond 32 bits": _vocab(2**32),
    "negative": _vocab(-1),
    "added_tokens.json": _added_file(2**31 - 1),
    "added_tokens.json, beyond 64 bits": _added_file(2**70),
    "added_tokens.json, negative": _added_file(-5),
    "added_tokens.json, a truth value": _added_file(True),
    "added_tokens_decoder": _decoder,
    "vocab.json": _vocab_file,
}


@pytest.mark.parametrize("case", HUGE)
def test_ids_beyond_all_reason_are_refused(folder: Path, case: str) -> None:
    HUGE[case](folder)
    with pytest.raises(CorruptCheckpoint) as caught:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sparse_ids_below_the_bound_are_read(folder: Path) -> None:
    _vocab(MAX_TOKEN_IDS - 1)(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == MAX_TOKEN_IDS
    assert tokenizer.encode("plain") == Tokenizer.from_folder(folder).encode("plain")


def test_every_token_and_end_token_needs_a_row(folder: Path) -> None:
    size = Tokenizer.from_folder(folder).vocab_size
    assert Tokenizer.from_folder(folder, num_rows=size + 20).vocab_size == size
    with pytest.raises(CorruptCheckpoint, match=f"tokenizer.json has {size} tokens, the model {size - 1}"):
        Tokenizer.from_folder(folder, num_rows=size - 1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": size + 7}))
    with pytest.raises(CorruptCheckpoint, match=f"end token {size + 7} is outside the vocabulary of {size}"):
        Tokenizer.from_folder(folder, num_rows=size)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_files_beyond_all_reason_are_not_parsed(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_BYTES", 1 << 20)
    with (folder / name).open("ab") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(CorruptCheckpoint, match=f"{name}: larger than 1 MiB"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_deep_json_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CorruptCheckpoint, match=name):
        Tokenizer.from_folder(folder)


def test_configurations_beyond_all_reason(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{" + '"a":{' * 100_000)
    with pytest.raises(CorruptCheckpoint, match=r"config.json: not readable as JSON"):
        load_config_json(path)
    path.write_text("{" + ",".join(f'"k{i}":0' for i in range(200_000)) + ',"k199999":1}')
    with pytest.raises(CorruptCheckpoint, match="k199999 is given twice"):  # in no time that grows with the square
        load_config_json(path)
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(CorruptCheckpoint, match=r"config.json: larger than 64 MiB"):
        load_config_json(path)
