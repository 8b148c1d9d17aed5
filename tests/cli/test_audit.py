"""`qnext audit`: a whole log, one that was changed, what is no log, and the records of one."""

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


def test_a_hash_that_was_kept_shows_what_is_missing_at_the_end(log: Path, capsys: Capture) -> None:
    document = json.loads(run(capsys, "audit", "verify", log, "--json").out)
    kept = ("--expect", document["last"], "--lines", document["num_lines"])
    assert "the expected hash is among them" in run(capsys, "audit", "verify", log, *kept).out
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert run(capsys, "audit", "verify", log).code == 0
    result = run(capsys, "audit", "verify", log, *kept)
    assert result.code == 5 and "no line has the expected hash" in result.error_line
    assert "64 hex digits" in run(capsys, "audit", "verify", log, "--expect", "x").error_line
    assert "give both" in run(capsys, "audit", "verify", log, "--lines", 3).error_line


def test_records_and_sums(log: Path, capsys: Capture) -> None:
    writing = AuditLog(log, clock=lambda: 1_700_000_000)
    writing.write(AuditRecord(request_id="old", route="/x", method="GET", status=429, key_id="k", prompt_tokens=7))
    writing.close()
    with log.open("ab") as file:
        file.write(b"torn")
    found = run(capsys, "audit", "show", log, "--key", "k")
    assert [line.split()[1] for line in found.out.splitlines()] == ["request_id", "old"]
    assert found.err.splitlines() == [f"qnext audit-show: warning: 1 lines cannot be read: {log}: line 7"]

    def ids(*arguments: object) -> list[str]:
        records = json.loads(run(capsys, "audit", "show", log, *arguments, "--json").out)["records"]
        return [record["request_id"] for record in records]

    assert ids("--request-id", "r3") == ["r3"] and ids("--last", 2) == ["r4", "old"]
    assert ids("--since", "1h") == ["r0", "r1", "r2", "r3", "r4"] and ids("--until", "2024-01-01") == ["old"]
    assert ids("--refused") == ["old"] and ids("--answered", "--route", "/x") == []
    sums = json.loads(run(capsys, "audit", "show", log, "--totals", "key_id", "--json").out)["totals"]
    assert sums["k"]["prompt_tokens"] == 7 and sums["-"]["requests"] == 5
    assert run(capsys, "audit", "show", log, "--totals", "day").out.splitlines()[1].startswith("2023-11-14")
    assert "--since 'soon' is neither" in run(capsys, "audit", "show", log, "--since", "soon").error_line
