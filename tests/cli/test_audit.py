"""`qnext audit`: a whole log, one that was changed, and what is no log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.server.access.audit import AuditLog, AuditRecord
from tests.cli.command import Capture, run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    writing = AuditLog(path, chain=True)
    for number in range(5):
        writing.write(AuditRecord(request_id=f"r{number}", route="/v1/models", method="GET", status=200))
    writing.close()
    return path


def test_a_whole_log(log: Path, capsys: Capture) -> None:
    document = json.loads(run(capsys, "audit", log, "--json").out)
    assert (document["ok"], document["num_lines"], document["error"]) == (True, 5, None)
    result = run(capsys, "audit", log)
    assert result.code == 0 and "5 lines" in result.out and document["last"] in result.out


def test_a_line_that_was_taken_out(log: Path, capsys: Capture) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2] + lines[3:]))
    result = run(capsys, "audit", log)
    assert (result.code, result.out) == (5, "")
    assert "line 3 does not follow the line before" in result.error_line
    result = run(capsys, "audit", log, "--json")
    assert result.code == 5 and json.loads(result.out)["ok"] is False


def test_what_is_no_log(tmp_path: Path, capsys: Capture) -> None:
    assert "no such file" in run(capsys, "audit", tmp_path / "none").error_line
    (tmp_path / "empty").touch()
    assert "holds no line" in run(capsys, "audit", tmp_path / "empty").error_line
