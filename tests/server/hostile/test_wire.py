"""Hostile bytes, headers and keys: what an attacker needs no valid request for."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pace import in_time
from tests.server.hostile import wire
from tests.server.hostile.harness import Harness, check_error
from tests.server.hostile.surfaces import MARK
from tests.server.hostile.wire import CLOSED, Bytes
from tests.server.hostile.wire_cases import REQUESTS

_QUICK = [case for case in REQUESTS if case.seconds <= 1.0]
_SLOW = [case for case in REQUESTS if case.seconds > 1.0]


def _refused_since(harness: Harness, offset: int) -> list[int]:
    """Statuses of what the audit log says of answers with an error since then."""
    with harness.audit_path.open("rb") as file:
        file.seek(offset)
        lines = [json.loads(line) for line in file.read().splitlines() if line.endswith(b"}")]
    assert MARK not in json.dumps(lines)
    return [line["status"] for line in lines if line["status"] >= 400 and line["status"] != 499]


def _check_lines(harness: Harness, case: Bytes, offset: int, found: list[int]) -> None:
    """Every error that was answered has its line, whoever answered it."""
    wanted = Counter(status for status in found if status >= 400)
    for _ in range(200):
        if Counter(_refused_since(harness, offset)) == wanted:
            return
        time.sleep(0.005)
    assert Counter(_refused_since(harness, offset)) == wanted, case.name


def _check(harness: Harness, case: Bytes) -> list[int]:
    """Statuses of all answers."""
    found: list[int] = []

    def attempt() -> float:
        statuses, seconds = _talk(harness, case)
        found.extend(statuses)
        return seconds

    in_time(case.seconds, attempt)
    return found


def _talk(harness: Harness, case: Bytes) -> tuple[list[int], float]:
    received, is_closed, seconds = wire.talk(harness.address, case)
    found = wire.statuses(received)
    assert (found[0] if found else CLOSED) in case.statuses, f"{case.name}: {received[:300]!r}"
    assert len(found) <= case.num_answers, f"{case.name}: {received[:600]!r}"
    assert is_closed or not case.closes, f"{case.name}: still open after {seconds:.1f} s, {received[:300]!r}"
    assert MARK.encode() not in received.lower() and b"Traceback" not in received, case.name
    if found and found[-1] >= 400 and len(wire.bodies(received)) == len(found):
        check_error(wire.bodies(received)[-1], "openai", case.name)
    return found, seconds


@pytest.mark.parametrize("case", _QUICK, ids=[case.name for case in _QUICK])
def test_bytes(harness: Harness, case: Bytes) -> None:
    harness.forgive()
    offset = harness.audit_path.stat().st_size
    _check_lines(harness, case, offset, _check(harness, case))
    harness.check_rest()


def test_bytes_that_come_slowly(harness: Harness) -> None:
    """All at once: they wait, and so does nobody else."""
    harness.forgive()
    harness.prober.mark()
    with ThreadPoolExecutor(len(_SLOW)) as pool:
        list(pool.map(lambda case: _check(harness, case), _SLOW))
    harness.check_rest()
