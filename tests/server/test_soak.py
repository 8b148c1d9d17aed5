"""A server under mixed load, with clients that leave and hostile ones: nothing is lost, nothing grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.soak import Report, soak


def check(report: Report) -> None:
    assert not report.wrong, report.wrong[:5]
    assert report.answered and report.disconnected and report.refused
    assert report.slots_running == 0 and report.waiting == 0
    # Connections come and go; what stays open is bounded by the clients.
    assert max(report.files[-3:]) <= min(report.files) + 40


def test_a_short_soak(chat_model: Path) -> None:
    check(soak(chat_model, minutes=0.15))


@pytest.mark.slow
def test_twenty_minutes(chat_model: Path) -> None:
    report = soak(chat_model, minutes=20.0)
    check(report)
    # Resident memory creeps as pages of the heap are touched for the first time; what malloc has in use does not
    # (docs/log.md). A hundred bytes for every request would be more than this.
    late = [memory for seconds, memory in report.resident if seconds >= report.seconds / 3]
    assert late[-1] - late[0] <= 0.01 * late[0], f"{report.slope:.0f} bytes a minute"
