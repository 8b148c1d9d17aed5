"""The audit log: one line per request whatever happens, a chain that shows changes, and no key in any log."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.engine import SamplingParams
from qnext.server.access.audit import AuditLog, AuditRecord
from qnext.server.access.audit_reading import Anchor, AuditFilter, read_lines, totals_by, verify_chain
from qnext.server.exchange import params_hash

SECRET = "qn-" + "Ab0_-xYz9" * 4 + "1234567"


def record(number: int = 0, **values: Any) -> AuditRecord:
    return AuditRecord(
        **{"request_id": f"r{number}", "route": "/v1/models/{id}", "method": "GET", "status": 200, **values}
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_every_field_and_the_time(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", clock=lambda: 1_800_000_000.25)
    log.write(record(key_id="12345678", seconds=1.5, stream=True, params_hash=params_hash(SamplingParams(top_p=0.5))))
    (line,) = lines(tmp_path / "audit")
    assert line["time"] == "2027-01-15T08:00:00.250Z"
    assert set(line) == {"time", *(field.name for field in fields(AuditRecord))}
    assert (line["route"], line["key_id"], line["seconds"], line["stream"]) == (
        "/v1/models/{id}",
        "12345678",
        1.5,
        True,
    )
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o600


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec=None), max_size=400))
def test_any_text_is_one_line_of_plain_characters(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any-text"
    path.unlink(missing_ok=True)
    log = AuditLog(path)
    log.write(record(model=text, client="\x1b[2J\x7f\n\r\u2028"))
    log.close()
    raw = path.read_bytes()
    assert log.num_failed == 0 and raw.count(b"\n") == 1 and raw.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in raw[:-1])
    assert (
        json.loads(raw)["model"] == json.loads(json.dumps(text[:256]))
        and json.loads(raw)["client"] == "\x1b[2J\x7f\n\r\u2028"
    )


def test_one_write_per_line_at_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit")
    write, calls = os.write, []
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or write(fd, data))
    log.write(record(1))
    with (tmp_path / "audit").open("ab") as other:
        other.write(b"{}\n")
    log.write(record(2))
    assert len(calls) == 2 and all(data.endswith(b"\n") for data in calls)
    assert [line.get("request_id") for line in lines(tmp_path / "audit")] == ["r1", None, "r2"]


def test_a_file_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("{}\n")
    (tmp_path / "audit").chmod(0o666)
    AuditLog(tmp_path / "audit").write(record())
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o600 and len(lines(tmp_path / "audit")) == 2
    (tmp_path / "link").symlink_to(tmp_path / "audit")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "pipe", tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(OSError):
            AuditLog(path)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_rotation_keeps_so_many_files(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path, max_bytes=1000, keep=keep)
    for number in range(40):
        log.write(record(number))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit", *(f"audit.{number}" for number in range(1, keep + 1))]
    assert all(file.stat().st_size <= 1000 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    kept = [line["request_id"] for file in [*reversed(files[1:]), path] for line in lines(file)]
    assert kept == [f"r{number}" for number in range(40 - len(kept), 40)] and len(kept) > 2 * keep
    assert log.num_failed == 0


def test_a_line_larger_than_a_file_is_written_all_the_same(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", max_bytes=10, keep=2)
    for number in range(4):
        log.write(record(number))
    assert [lines(tmp_path / name)[0]["request_id"] for name in ("audit.2", "audit.1", "audit")] == ["r1", "r2", "r3"]


def test_whoever_moves_the_file_away_has_it_opened_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit", chain=True)
    log.write(record(1))
    (tmp_path / "audit").rename(tmp_path / "audit.1")
    log.reopen()
    log.write(record(2))
    (tmp_path / "audit").rename(tmp_path / "elsewhere")
    log.reopen()
    log.write(record(3))
    assert lines(tmp_path / "audit")[0]["previous"] == verify_chain(tmp_path / "elsewhere").last
    (tmp_path / "elsewhere").rename(tmp_path / "audit")
    assert [line["request_id"] for line in lines(tmp_path / "audit")] == ["r2"]
    assert verify_chain(tmp_path / "audit").error is None and verify_chain(tmp_path / "audit").num_lines == 2


# ---- the chain ----


def write_chain(path: Path, count: int = 30) -> None:
    """With rotation, and a restart after every seventh line."""
    for start in range(0, count, 7):
        log = AuditLog(path, max_bytes=3000, keep=9, chain=True)
        for number in range(start, min(start + 7, count)):
            log.write(record(number))
        log.close()


def test_a_chain_holds_across_files_and_restarts(tmp_path: Path) -> None:
    write_chain(tmp_path / "audit")
    check = verify_chain(tmp_path / "audit")
    assert (check.num_lines, check.error) == (30, None) and len(list(tmp_path.iterdir())) > 3
    oldest = max(tmp_path.glob("audit.*"))
    assert lines(oldest)[0]["previous"] == "0" * 64
    oldest.unlink()  # what is too old goes
    assert verify_chain(tmp_path / "audit").error is None
    log = AuditLog(tmp_path / "audit", chain=True)
    log.write(record())
    assert lines(tmp_path / "audit")[-1]["previous"] == check.last


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda rows: rows[2].replace(b"r", b"s", 1) and [*rows[:2], rows[2].replace(b"200", b"201"), *rows[3:]], 4),
        (lambda rows: [*rows[:2], *rows[3:]], 3),
        (lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]], 3),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 4),
        (lambda rows: [*rows[:3], b"{}\n", *rows[3:]], 4),
        (lambda rows: [*rows[:3], rows[3][:50] + b"\n", *rows[4:]], 4),
    ],
    ids=["changed", "removed", "swapped", "doubled", "inserted", "cut"],
)
def test_a_change_shows(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], where: int) -> None:
    path = tmp_path / "audit"
    log = AuditLog(path, chain=True)
    for number in range(8):
        log.write(record(number))
    with path.open("rb") as file:
        rows = file.readlines()
    path.write_bytes(b"".join(change(rows)))
    assert f"line {where}" in (verify_chain(path).error or "")


def test_a_chain_holds_where_the_file_was_moved_away_and_the_next_not_opened(tmp_path: Path) -> None:
    write_chain(tmp_path / "audit", 3)
    (tmp_path / "audit").rename(tmp_path / "audit.1")
    assert verify_chain(tmp_path / "audit").error is None and verify_chain(tmp_path / "audit").num_lines == 3
    with pytest.raises(FileNotFoundError):
        verify_chain(tmp_path / "nothing")


def test_lines_taken_from_the_end_show_by_the_last_hash(tmp_path: Path) -> None:
    write_chain(tmp_path / "audit", 5)
    before = verify_chain(tmp_path / "audit")
    rows = (tmp_path / "audit").read_bytes().splitlines(keepends=True)
    (tmp_path / "audit").write_bytes(b"".join(rows[:-1]))
    after = verify_chain(tmp_path / "audit")
    assert after.error is None and after.last != before.last and after.num_lines == before.num_lines - 1
    anchor = Anchor(before.last, before.num_lines)
    assert "no line has the expected hash" in (verify_chain(tmp_path / "audit", anchor).error or "")
    assert verify_chain(tmp_path / "audit", Anchor(after.last, after.num_lines)).error is None


def test_an_anchor_stands_at_its_line_or_before_it_where_files_were_rotated_away(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    write_chain(path, 20)
    anchor = Anchor(verify_chain(path).last, 20)
    write_chain(path, 14)
    assert verify_chain(path, anchor).error is None and verify_chain(path).is_from_start
    assert "is that of line 20, not of line 19" in (verify_chain(path, anchor._replace(num_lines=19)).error or "")
    assert "is that of line 20, not of line 21" in (verify_chain(path, anchor._replace(num_lines=21)).error or "")
    max(tmp_path.glob("audit.*"), key=lambda file: int(file.suffix[1:])).unlink()
    check = verify_chain(path, anchor)
    assert check.error is None and not check.is_from_start and check.num_lines < 34


def test_every_fault_is_named(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    write_chain(path, 6)
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([rows[0], b"[1]\n", rows[2], b"\xff\n", *rows[4:]]))
    faults = verify_chain(path).faults
    assert [fault.partition("line ")[2].partition(" ")[0] for fault in faults] == ["2", "3", "4", "5"]
    assert [line.number for line in read_lines(path) if line.values is None] == [2, 4]


# ---- its records ----


def test_filters_and_sums() -> None:
    rows = [
        {"time": f"2026-11-0{day}T00:00:00.000Z", "key_id": key, "status": status, "prompt_tokens": tokens}
        for day, key, status, tokens in ((1, "a", 200, 5), (2, "b", 429, None), (3, "a", 200, 7), (3, None, 401, 0))
    ]

    def days(**conditions: Any) -> str:
        return "".join(row["time"][9] for row in rows if AuditFilter(**conditions).takes(row))

    assert (days(), days(key_id="a"), days(is_refused=True), days(is_refused=False)) == ("1233", "13", "23", "13")
    assert days(since="2026-11-02T00:00:00.000Z") == "233" and days(until="2026-11-02T00:00:00.000Z") == "1"
    sums = totals_by("key_id", rows)
    assert list(sums) == ["a", "-", "b"]
    assert (sums["a"].requests, sums["a"].prompt_tokens, sums["b"].refused, sums["b"].prompt_tokens) == (2, 12, 1, 0)
    assert {day: total.requests for day, total in totals_by("day", rows).items()} == {
        "2026-11-01": 1,
        "2026-11-02": 1,
        "2026-11-03": 2,
    }


# ---- a disk that is full ----


@pytest.mark.parametrize("num_bytes", [None, 0, 30])
@pytest.mark.parametrize("can_truncate", [True, False])
def test_a_failed_write_costs_its_line_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_bytes: int | None,
    can_truncate: bool,
) -> None:
    path, write = tmp_path / "audit", os.write
    log = AuditLog(path, chain=True)
    log.write(record(1))

    def full(fd: int, data: bytes) -> int:
        if num_bytes is None:
            raise OSError(28, "No space left on device")
        return write(fd, data[:num_bytes])

    def refuse(*_: object) -> None:
        raise PermissionError(1, "append only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        if not can_truncate:
            patch.setattr(os, "ftruncate", refuse)
        for number in (2, 3):
            log.write(record(number))
    log.write(record(4))
    log.write(record(5))
    assert log.num_failed == 2
    assert [entry.getMessage() for entry in caplog.records] == [
        f"the audit log {path} loses lines: No space left on device"
    ]
    whole = [row for row in path.read_text().splitlines() if row.startswith("{") and row.endswith("}")]
    assert [json.loads(row)["request_id"] for row in whole] == ["r1", "r4", "r5"]
    if can_truncate or num_bytes is None:
        assert verify_chain(path).error is None and verify_chain(path).num_lines == 3
    elif num_bytes:
        assert "line 2 is damaged" in (verify_chain(path).error or "")


def test_a_line_torn_by_a_crash_ends_before_the_next(tmp_path: Path) -> None:
    write_chain(tmp_path / "audit", 3)
    with (tmp_path / "audit").open("ab") as file:
        file.write(b'{"time":"20')
    log = AuditLog(tmp_path / "audit", chain=True)
    log.write(record(4))
    rows = (tmp_path / "audit").read_text().splitlines()
    assert len(rows) == 5 and rows[3] == '{"time":"20' and json.loads(rows[4])["request_id"] == "r4"
    assert "line 4 is damaged" in (verify_chain(tmp_path / "audit").error or "")


def test_a_value_that_is_no_json_costs_its_line_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path / "audit")
    for value in (float("nan"), float("inf"), object()):
        log.write(record(seconds=value))
    log.write(record(seconds=0.5))
    assert log.num_failed == 3 and len(caplog.records) == 1 and len(lines(tmp_path / "audit")) == 1
    log.close()
    log.write(record())
    assert log.num_failed == 4


def test_rotation_that_fails_goes_on_in_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit", max_bytes=500, chain=True)
    log.write(record(1))

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        log.write(record(2))
    log.write(record(3))
    assert log.num_failed == 0
    assert [line["request_id"] for line in lines(tmp_path / "audit.1")] == ["r1", "r2"]
    assert verify_chain(tmp_path / "audit").error is None


def test_rotation_without_a_free_descriptor_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit", max_bytes=500, chain=True)
    log.write(record(1))

    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        log.write(record(2))
    assert not (tmp_path / "audit").exists()
    for number in (3, 4):
        log.write(record(number))
    assert log.num_failed == 0
    files = [*sorted(tmp_path.glob("audit.*"), reverse=True), tmp_path / "audit"]
    assert [line["request_id"] for file in files for line in lines(file)] == ["r1", "r2", "r3", "r4"]
    assert verify_chain(tmp_path / "audit").error is None


def test_equal_parameters_have_equal_hashes() -> None:
    one, other = ({1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0})
    assert params_hash(SamplingParams(logit_bias=one)) == params_hash(SamplingParams(logit_bias=other))
    assert params_hash(SamplingParams(top_p=0.5)) != params_hash(SamplingParams(top_p=0.25))
    assert len(params_hash(SamplingParams(stop_token_ids=(3,)))) == 16
