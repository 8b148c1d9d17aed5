"""Loads of steps, seconds fitted to them, and the file that keeps these."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path

import pytest

from qnext.config import preset
from qnext.errors import QnextWarning
from qnext.planning import distinct_experts, measured
from qnext.planning.calibration import Calibration, calibration_file, read_calibration, write_calibration
from qnext.planning.expert_memory import ExpertSizes
from qnext.planning.measured import MeasuredFigure, measured_file, note_measured, read_measured, told_errors
from qnext.planning.speed_model import SpeedModel, fit_units, from_peaks
from qnext.planning.step_load import (
    Peaks,
    StepLoad,
    StoredSizes,
    bound_seconds,
    decode_load,
    mtp_bytes,
    prefill_load,
    read_bytes,
)

CONFIG = preset("80b-a3b")
SIZES = StoredSizes(1_400_000_000, ExpertSizes(48, 512, 1_769_472, 3 << 30), can_stream=True)
UNITS = StepLoad(1e-4, 2e-5, 3e-5, 4e-11, 3e-12, 2e-9, 9e-12, 5e-11, 6e-12, 0.0, 4e-6, 1e-11, 2e-11)
SPEED = SpeedModel(UNITS, UNITS)


def test_a_batch_reads_weights_once_and_sequences_each() -> None:
    one, many = (decode_load(CONFIG, SIZES, context=1000, batch=batch) for batch in (1, 8))
    assert many.kv_bytes == 8 * one.kv_bytes and many.state_bytes == 8 * one.state_bytes
    assert many.matrix_operations == 8 * one.matrix_operations and many.steps == one.steps
    experts = 48 * 1_769_472
    assert one.weight_bytes == 1_400_000_000 + 10 * experts
    assert many.weight_bytes == pytest.approx(1_400_000_000 + distinct_experts(512, 10, 8) * experts)
    assert (one.expert_calls, round(many.expert_calls / 48)) == (480, 75)


def test_what_the_cache_holds_is_not_cold() -> None:
    sizes = (0, SIZES.weight_bytes // 4, 1 << 50)
    loads = [decode_load(CONFIG, SIZES, context=1000, cache_bytes=size) for size in sizes]
    shares = [load.cold_bytes / load.weight_bytes for load in loads]
    assert shares == pytest.approx([1, 0.75, 0], abs=0.002)
    assert [load.cold_kv_bytes / load.kv_bytes for load in loads] == pytest.approx(shares)


def test_a_prompt_in_pieces_reads_weights_again_and_computes_the_same() -> None:
    whole, pieces = (prefill_load(CONFIG, SIZES, num_tokens=1000, chunk=chunk) for chunk in (1000, 300))
    assert (whole.steps, pieces.steps, pieces.full_layers) == (1, 4, 48)
    assert whole.operations == pieces.operations and whole.row_numbers == pieces.row_numbers
    assert pieces.weight_bytes == pytest.approx(3 * read_bytes(CONFIG, SIZES, 300) + read_bytes(CONFIG, SIZES, 100))


def test_bounds_are_below_what_is_expected() -> None:
    speed = from_peaks(bandwidth=1e12, operations=1e14, share=0.4, layer_seconds=1e-5)
    for batch in (1, 100, 10_000):
        load = decode_load(CONFIG, SIZES, context=1000, batch=batch)
        bound = bound_seconds(load, Peaks(1e12, 1e14))
        assert bound + 48e-5 <= speed.decode_seconds(load) * 1.000001


def test_drafts_read_one_expert_of_each_token() -> None:
    assert mtp_bytes(CONFIG, 1000, 10**6) == pytest.approx(1000, rel=1e-3)
    assert 0 < mtp_bytes(CONFIG, 1000, 1) < 60


def _loads() -> list[StepLoad]:
    draw, scales = random.Random(1), (1, 9, 9, 1e9, 1e10, 1e6, 1e9, 1e8, 1e9, 1e7, 1e3, 1e9, 1e8)
    return [StepLoad(*(draw.random() * scale for scale in scales)) for _ in range(60)]


def test_a_fit_finds_the_seconds_that_made_the_times() -> None:
    loads = _loads()
    seconds = [SPEED.decode_seconds(load) for load in loads]
    assert fit_units(loads, seconds, used=StepLoad._fields) == pytest.approx(UNITS, rel=1e-3, abs=1e-16)


def test_a_fit_is_never_negative_and_not_led_by_a_few() -> None:
    loads, draw = _loads(), random.Random(2)
    seconds = [SPEED.decode_seconds(load) * draw.uniform(0.95, 1.05) for load in loads]
    for number in range(0, 60, 12):
        seconds[number] *= 20  # somebody else had the processor
    found = fit_units(loads, seconds, used=StepLoad._fields)
    assert all(value >= 0 for value in found)
    fit = SpeedModel(found, found)
    wrong = sorted(abs(fit.decode_seconds(load) / SPEED.decode_seconds(load) - 1) for load in loads)
    assert wrong[30] < 0.1


def _calibration() -> Calibration:
    errors = {"bf16": {"decode": 0.05, "prefill": 0.07}}
    operations = {"float32": 1e11, "bfloat16": 2e11, "int8": None}
    return Calibration("2026-11-30", "seven models", 2, {"bf16": SPEED}, errors, 3e10, operations, 1 << 25)


def test_a_calibration_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "qnext" / "machine.json"
    assert read_calibration(path) is None
    write_calibration(path, _calibration())
    found = read_calibration(path)
    assert found == _calibration() and found is not None
    assert found.peaks("bf16") == (3e10, 2e11) and found.peaks("int4") == (3e10, 1e11), "no int8 here"
    assert "2026-11-30 from seven models with 2 threads" in found.told
    assert calibration_file(1, tmp_path) != calibration_file(2, tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", '{"form": 2}', '{"form": 1}', "null", "negative", "missing"])
def test_a_damaged_calibration_is_ignored_with_a_warning(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "machine.json"
    write_calibration(path, _calibration())
    values = json.loads(path.read_text())
    if damage == "negative":
        values["speeds"]["bf16"]["decode"]["steps"] = -1
    elif damage == "missing":
        del values["speeds"]["bf16"]["prefill"]["kv_bytes"]
    path.write_text(json.dumps(values) if damage in ("negative", "missing") else damage)
    with pytest.warns(QnextWarning, match="no calibration that can be read"):
        assert read_calibration(path) is None


def test_measured_figures_are_kept(tmp_path: Path) -> None:
    path = measured_file(tmp_path / "machine.json")
    figures = [MeasuredFigure("2026-11-30", "m", "decode", 512, 11.0, 10.0)]
    note_measured(path, figures)
    note_measured(path, [figures[0]._replace(predicted=8.0)])
    assert [each.predicted for each in read_measured(path)] == [11.0, 8.0]
    assert told_errors(read_measured(path)).endswith("the median error is 15.0%, the worst 20.0%")
    path.write_text(path.read_text() + '{"date": 1}\n[]\n')
    with pytest.warns(QnextWarning, match="is no figure"):
        assert len(read_measured(path)) == 2
    assert doctest.testmod(measured).failed == 0
