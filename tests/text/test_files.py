"""Texts that users name: what is none is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.errors import UsageError
from qnext.text.files import read_user_text


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b" \n\t\n", "empty"), (b"ab\xff", "not UTF-8 .byte 2"), (b"a\0b", "NUL")],
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"bad.txt: .*{message}"):
        read_user_text(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.txt: No such file"):
        read_user_text(tmp_path / "gone.txt")
    with pytest.raises(UsageError, match="here: Is a directory"):
        (tmp_path / "here").mkdir()
        read_user_text(tmp_path / "here")
