"""`qnext attention`: its forms, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from .command import Capture, run

TEXT = "The delta rule forgets; attention does not. " * 2


def test_table_json_and_picture(plain_folder: Path, capsys: Capture, tmp_path: Path) -> None:
    table = run(capsys, "attention", plain_folder, TEXT, "--top", "1")
    assert table.code == 0, table.err
    assert "half-life" in table.out and "first token" in table.out
    picture = tmp_path / "inside.svg"
    result = run(capsys, "attention", plain_folder, TEXT, "--tokens", "2", "--picture", picture, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [layer["kind"] for layer in document["layers"]] == ["delta", "attention"]
    assert len(document["largest"]) == 2 and len(document["generated"]) <= 2
    assert all(len(layer["top"]) == 3 for layer in document["layers"])
    ElementTree.parse(picture)


def test_what_is_refused(plain_folder: Path, capsys: Capture, tmp_path: Path) -> None:
    for arguments, word in (
        ([], "give one text"),
        (["x", "--text", tmp_path], "give one text"),
        (["x"], "one token"),
        ([TEXT, "--picture", tmp_path / "a.gif"], ".png or .svg"),
    ):
        result = run(capsys, "attention", plain_folder, *arguments)
        assert result.code == 2
        assert word in result.error_line
