"""`qnext eval`: files, folders and patterns, bytes of any kind, each file and all of them with an interval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.text.any_bytes import encode_bytes
from qnext.text.tokenizer import Tokenizer

from .command import Capture, run

ODD = b"plain \xff\xfe then \xe6\x9d\xb1 \x00 and \xe6\x9d" + bytes(range(256))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "a.md").write_text("def main(): pass\n" * 6)
    (root / "b.txt").write_text("Grüße aus 東京\n" * 3)
    (root / "inner").mkdir()
    (root / "inner" / "c.bin").write_bytes(ODD)
    (root / ".hidden").write_text("never read")
    (root / "empty").write_text("")
    return root


def test_any_bytes_come_back(plain_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(plain_folder)
    for data in (ODD, b"", b"text", b"\xff", "東京".encode()):
        assert b"".join(map(tokenizer.token_bytes, encode_bytes(data, tokenizer))) == data
    assert encode_bytes(b"def f():\n", tokenizer) == tokenizer.encode("def f():\n")


def test_all_files_are_their_sum(plain_folder: Path, texts: Path, capsys: Capture) -> None:
    told = run(capsys, "eval", plain_folder, texts, "--json")
    assert told.code == 0, told.err
    document = json.loads(told.out)
    assert [Path(each["file"]).name for each in document["files"]] == ["a.md", "b.txt", "c.bin"]
    bits = sum(each["bits_per_byte"] * each["num_bytes"] for each in document["files"])
    assert document["num_bytes"] == sum(each["num_bytes"] for each in document["files"])
    assert document["bits_per_byte"] == pytest.approx(bits / document["num_bytes"])
    low, high = document["interval"]
    assert low < document["bits_per_byte"] < high
    alone = json.loads(run(capsys, "eval", plain_folder, texts / "inner" / "c.bin", "--json").out)
    assert alone["bits_per_byte"] == pytest.approx(document["files"][2]["bits_per_byte"]) and alone["interval"] is None


def test_a_pattern_and_a_table(plain_folder: Path, texts: Path, capsys: Capture) -> None:
    told = run(capsys, "eval", plain_folder, f"{texts}/*.*", texts / "a.md")
    assert told.code == 0 and told.out.startswith("bits per byte ") and "documents        2, " in told.out
    rows = [line for line in told.out.splitlines() if line.endswith((".md", ".txt"))]
    assert len(rows) == 2 and rows == sorted(rows, key=lambda row: float(row.split()[0]))


@pytest.mark.parametrize(
    ("name", "line"),
    [("none", "none: No such file"), ("empty", "empty: empty"), ("*.rs", "*.rs: no file"), ("", "no file in it")],
)
def test_mistakes_are_one_line(name: str, line: str, plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").write_text("")
    told = run(capsys, "eval", plain_folder, f"{tmp_path}/{name}" if name else tmp_path)
    assert told.code == 2 and line in told.error_line
