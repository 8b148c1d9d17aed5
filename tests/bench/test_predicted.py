"""What a calibration predicts of a bench, and the note of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qnext.bench.files import BenchFiles
from qnext.bench.plan import BenchPlan
from qnext.bench.predicted import noted, predicted_rates
from qnext.planning.calibration import Calibration, calibration_file, write_calibration
from qnext.planning.measured import measured_file, read_measured
from qnext.planning.speed_model import SpeedModel
from qnext.planning.step_load import StepLoad
from tests.cli.command import make_model
from tests.config.folder import read_config


def test_figures_are_predicted_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = make_model(tmp_path)
    plan = BenchPlan(
        files=BenchFiles(folder, tmp_path / "cache"),
        config=read_config(folder),
        schemes=["bf16"],
        peers=[],
        threads=3,
        prefill=48,
        depths=[0, 64],
        decode_tokens=4,
        rounds=1,
        date="2026-11-30",
    )
    assert predicted_rates(plan) == {} and noted(plan, {"model": "m", "schemes": []}, {}) == []
    each_step = StepLoad(0.25, *([0.0] * (len(StepLoad._fields) - 1)))
    speeds = {"bf16": SpeedModel(each_step, each_step)}
    place = calibration_file(3)
    write_calibration(place, Calibration("2026-11-30", "nothing", 3, speeds, {}, 1e10, {"float32": 1e11}, 0))
    rates = predicted_rates(plan)
    assert rates == {("bf16", "decode", 0): 4.0, ("bf16", "decode", 64): 4.0, ("bf16", "prompt", 48): 48 * 4.0}
    figures: list[dict[str, Any]] = [
        {"kind": "prefill", "tokens": 48, "tokens_per_second": {"median": 96.0}},
        {"kind": "decode", "depth": 64, "tokens_per_second": {"median": 5.0}},
        {"kind": "generate", "depth": 0, "tokens_per_second": {"median": 5.0}},
    ]
    found = noted(plan, {"model": "m", "schemes": [{"scheme": "bf16", "figures": figures}]}, rates)
    assert [(each.kind, each.length, each.error) for each in found] == [
        ("prompt", 48, 1.0),
        ("decode", 64, pytest.approx(-0.2)),
    ]
    assert read_measured(measured_file(place)) == found
