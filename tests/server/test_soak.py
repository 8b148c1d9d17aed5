"""A server under mixed load, with clients that leave and attackers: nothing is lost, nothing grows, nobody waits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.server.soak import Report, robust_slope, soak

MIB = 1 << 20


def check(report: Report) -> None:
    assert not report.wrong, report.wrong[:5]
    assert report.answered and report.disconnected and report.attacked
    assert report.slots_running == 0 and report.waiting == 0
    assert report.exit_code == 0 and not report.left_over
    # Connections come and go; what stays open is bounded by the clients.
    assert max(report.files[-3:]) <= min(report.files) + 40


def check_attacked(report: Report) -> None:
    """What an outsider would measure of an attack."""
    check(report)
    health = report.health.figures()
    assert health["own max"] < 100.0, health  # milliseconds, without what the machine took
    assert report.most_with_children < 1.5 * (1 << 30)


def test_slopes_are_found_beneath_noise() -> None:
    points = [(float(t), 100.0 + 3.0 * t / 60 + 2.0 * math.sin(t) + (50.0 if t % 97 == 0 else 0.0)) for t in range(900)]
    slope, error = robust_slope(points)
    assert abs(slope - 3.0) < 0.2 and 0.0 < error < 0.5


def test_a_short_soak(chat_model: Path, tmp_path: Path) -> None:
    check(soak(chat_model, tmp_path, minutes=0.1, groups=["salts", "broken", "wire"]))


@pytest.mark.slow
def test_a_minute_with_all_attacks(chat_model: Path, tmp_path: Path) -> None:
    report = soak(chat_model, tmp_path, minutes=1.0)
    check_attacked(report)
    assert {name.split()[0] for name in report.attacked} >= {"stalled", "wire", "grammar", "numbers"}


@pytest.mark.slow
def test_twenty_minutes(chat_model: Path, tmp_path: Path) -> None:
    report = soak(chat_model, tmp_path, minutes=20.0)
    check_attacked(report)
    # Known well enough to mean something, and no more than three hundredths of a MiB a minute, within the error.
    shown = f"{report.slope / MIB:.3f} +- {report.slope_error / MIB:.3f} MiB a minute"
    assert report.slope_error < 0.1 * MIB, shown
    assert report.slope - 2.0 * report.slope_error < 0.03 * MIB, shown
