"""What the calibration of this machine predicts of a bench, and a note of both when it is measured."""

from __future__ import annotations

from datetime import date
from typing import Any

from qnext.bench.files import FLOAT_SCHEMES
from qnext.bench.plan import BenchPlan
from qnext.checkpoint.check import read_layout
from qnext.planning.calibration import calibration_file, read_calibration
from qnext.planning.measured import MeasuredFigure, measured_file, note_measured
from qnext.planning.plan import default_step_tokens
from qnext.planning.step_load import decode_load, prefill_load
from qnext.session.placement import CPU
from qnext.session.planned import planned_folder

PredictedRates = dict[tuple[str, str, int], float]  # by scheme, decode or prompt, and length


def predicted_rates(plan: BenchPlan) -> PredictedRates:
    """Tokens a second, as far as the machine is calibrated for the weights; none for experts on disk, and none of a
    GPU."""
    calibration = read_calibration(calibration_file(plan.threads))
    found: PredictedRates = {}
    if calibration is None or plan.expert_memory is not None or plan.device != CPU:
        return found
    config = plan.config
    for scheme in plan.schemes:
        if scheme in FLOAT_SCHEMES and scheme != plan.files.stored:
            continue  # the folder's numbers are converted when it is loaded
        folder = plan.files.folder_of(scheme)
        planned = planned_folder(str(folder), read_layout(folder))
        speed = calibration.speeds.get(planned.precision)
        if speed is None:
            continue
        for depth in plan.depths:
            context, cached = max(depth, 1) + plan.decode_tokens // 2, calibration.cache_bytes
            load = decode_load(config, planned.sizes, context=context, cache_bytes=cached)
            found[scheme, "decode", depth] = 1 / speed.decode_seconds(load)
        chunk = min(plan.prefill, default_step_tokens(config))
        prompt = prefill_load(config, planned.sizes, num_tokens=plan.prefill, chunk=chunk)
        found[scheme, "prompt", plan.prefill] = plan.prefill / speed.prefill_seconds(prompt)
    return found


def noted(plan: BenchPlan, document: dict[str, Any], rates: PredictedRates) -> list[MeasuredFigure]:
    """The figures that were predicted, put into the machine's file of them."""
    day = plan.date or str(date.today())
    found = []
    for result in document["schemes"]:
        for figure in result["figures"]:
            kind = "prompt" if figure["kind"] == "prefill" else figure["kind"]
            length = figure["tokens" if kind == "prompt" else "depth"]
            if rate := rates.get((result["scheme"], kind, length)):
                measured = figure["tokens_per_second"]["median"]
                model = f"{document['model']}, {result['scheme']}"
                found.append(MeasuredFigure(day, model, kind, length, rate, measured))
    if found:
        note_measured(measured_file(calibration_file(plan.threads)), found)
    return found
