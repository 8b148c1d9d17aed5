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
    assert report.slope <= 3 * report.slope_error, f"{report.slope:.0f} ± {report.slope_error:.0f} bytes a minute"
