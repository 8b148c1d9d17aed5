"""Is what `qnext plan` predicts what is then measured: memory, prompts and decoding, on a grid of 24 points?

Four models of random weights, three contexts, two precisions; each point in a fresh process. The prediction of a point
is written into the file of results before the point is measured, from a calibration of the machine by other models
(`qnext plan --calibrate`, or `--calibrate` here). Points that the file has are not measured again, so the grid can be
run in pieces: `--points 0-5`. Memory is the process's peak less its peak after importing everything. `--page` writes
the page of figures and its picture from the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from _pair import print_json

from qnext import ops
from qnext.bench.contest import Contestants, machine
from qnext.bench.workers import qnext_worker
from qnext.checkpoint import create_folder
from qnext.checkpoint.reshape import reshaped
from qnext.config import ModelConfig, preset
from qnext.diagnostics.charts import Axis, Curve, LineChart, write_charts
from qnext.diagnostics.plan import plan_model
from qnext.files import write_file
from qnext.planning.calibration import calibration_file, read_calibration, write_calibration
from qnext.planning.machine import format_bytes, num_allowed_cores
from qnext.quant.scheme import make_policy
from qnext.session.planned import Asked, planned_model

CONTEXTS = (512, 4096, 16384)
SCHEMES = ("bf16", "int4-g32")
DECODED = 32
FIGURES = ("memory", "prompt", "decode")
LIMITS = {"memory": 0.10, "prompt": 0.20, "decode": 0.20}


def models() -> dict[str, ModelConfig]:
    """Two of the small family with a longer context, four layers of the released model, one of Qwen3-32B."""
    longer = {"max_position_embeddings": 20_480}
    released = reshaped(preset("80b-a3b"), layers=4, experts=64, top_k=None, vocab_size=32768, has_mtp=False)
    dense = reshaped(preset("qwen3-32b"), layers=1, experts=None, top_k=None, vocab_size=8192, has_mtp=False)
    return {
        "mini-90m": replace(preset("mini-90m"), **longer),
        "small-200m": replace(preset("small-200m"), **longer),
        "80b-a3b, 4 layers, 64 experts": released,
        "qwen3-32b, 1 layer": dense,
    }


class Point(NamedTuple):
    """One model in one scheme at one context."""

    model: str
    scheme: str
    context: int

    @property
    def key(self) -> str:
        return f"{self.model} | {self.scheme} | {self.context}"


def grid() -> list[Point]:
    return [Point(model, scheme, context) for model in models() for scheme in SCHEMES for context in CONTEXTS]


def folder_of(point: Point, scratch: Path) -> Path:
    """The model's folder, made where it is not there."""
    name = f"{''.join(c if c.isalnum() else '-' for c in point.model)}-{point.scheme}"
    folder, config = scratch / name, models()[point.model]
    if not folder.is_dir():
        policy = None
        if point.scheme != "bf16":
            policy = make_policy(point.scheme, head=None, is_tied=config.tie_word_embeddings)
        create_folder(config, folder, seed=0, policy=policy)
    return folder


def predict(folder: Path, point: Point) -> dict[str, float]:
    """Bytes, and tokens a second, by the plan of the folder."""
    found = plan_model(planned_model(str(folder)), Asked(context=point.context)).forecast
    return {
        "memory": found.likely_bytes,
        "prompt": found.prefill[point.context],
        "decode": found.traffic["uniform"].decode,
    }


def measure(folder: Path, point: Point, threads: int) -> dict[str, float]:
    """In a process of its own. A long prompt is read once, a short one a second time, when all memory is there."""
    arguments = {"folder": str(folder), "dtype": None, "threads": threads, "decode_tokens": DECODED}
    with Contestants({"qnext": (qnext_worker, arguments)}) as worker:
        worker.step("qnext", "decode", point.context)
        seconds = [worker.step("qnext", "decode", point.context)[1] for _ in range(5)]
        facts = worker.step("qnext", "facts")[1]
        reading = worker.step("qnext", "reading", point.context)[1]
        if point.context < CONTEXTS[-1]:
            reading = worker.step("qnext", "prefill", point.context)[1]
    return {
        "memory": facts["peak_bytes"] - facts["peak_bytes_before"],
        "prompt": point.context / reading,
        "decode": DECODED / statistics.median(seconds),
        "decode_slowest": DECODED / max(seconds),
        "decode_fastest": DECODED / min(seconds),
    }


def errors(results: dict[str, Any]) -> dict[str, list[float]]:
    """Predicted over measured less one, of every figure of every point that is measured."""
    rows = [row for row in results["points"].values() if "measured" in row]
    return {name: [row["predicted"][name] / row["measured"][name] - 1 for row in rows] for name in FIGURES}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, values in errors(results).items():
        sizes = sorted(map(abs, values))
        found[name] = {
            "median": statistics.median(sizes),
            "within_limit": sum(size <= LIMITS[name] for size in sizes),
            "worst": sizes[-1],
            "limit": LIMITS[name],
            "met": statistics.median(sizes) <= LIMITS[name],
        }
    return found


def shown(name: str, value: float) -> str:
    return format_bytes(int(value)) if name == "memory" else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def table(results: dict[str, Any]) -> Iterator[str]:
    heads = [f"{name} predicted | measured | off" for name in ("memory", "prompt, tokens/s,", "decode, tokens/s,")]
    yield f"| model | weights | context | {' | '.join(heads)} |"
    yield f"|---|---|{'--:|' * 10}"
    for row in results["points"].values():
        if "measured" not in row:
            continue
        cells = [row["model"], row["scheme"], f"{row['context']:,}"]
        for name in FIGURES:
            predicted, measured = row["predicted"][name], row["measured"][name]
            cells += [shown(name, predicted), shown(name, measured), f"{predicted / measured - 1:+.0%}"]
        yield f"| {' | '.join(cells)} |"


def page(results: dict[str, Any], folder: Path) -> None:
    """`plan.md` and `plan.svg` from the results alone."""
    rows = [row for row in results["points"].values() if "measured" in row]
    charts = [_scatter(name, rows) for name in FIGURES]
    write_charts(folder / "plan.svg", charts, title="predicted by qnext plan, and measured")
    about = results["machine"]
    lines = [
        "# Predicted and measured",
        "",
        "Written by `benchmarks/bench_plan.py --page` from its results; the prediction of a point was noted before it "
        "was measured.",
        "",
        f"Machine: {about['cpu']}, {about['cores']} cores, threads that computed: {results['threads']}, "
        f"{results['date']}; {results['calibration']}. Memory is the peak of a process beyond what importing took. "
        f"Each point ran in a process of its own; decoding is the median of five times {DECODED} tokens.",
        "",
        "| figure | median error | limit | points within the limit | worst |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, found in summary(results).items():
        lines.append(
            f"| {name} | {found['median']:.1%} | {found['limit']:.0%} | {found['within_limit']} of {len(rows)} | "
            f"{found['worst']:.0%} |"
        )
    lines += ["", "![predicted over measured](plan.svg)", "", *table(results), ""]
    write_file(folder / "plan.md", "\n".join(lines))


def _scatter(name: str, rows: list[dict[str, Any]]) -> LineChart:
    unit, scale = ("MiB", 1 << 20) if name == "memory" else ("tokens/s", 1)
    curves = []
    for scheme in SCHEMES:
        chosen = [row for row in rows if row["scheme"] == scheme]
        x = [row["measured"][name] / scale for row in chosen]
        curves.append(Curve(scheme, x, [row["predicted"][name] / scale for row in chosen], has_line=False))
    ends = [f([row["measured"][name] / scale for row in rows]) for f in (min, max)]
    for label, factor in (("exact", 1.0), (f"{LIMITS[name]:.0%} off", 1 + LIMITS[name]), ("", 1 - LIMITS[name])):
        curves.append(Curve(label, ends, [factor * end for end in ends], is_dashed=True, color="#7f7f7f"))
    measured, predicted = Axis(f"measured, {unit}", is_log=True), Axis(f"predicted, {unit}", is_log=True)
    return LineChart(name, measured, predicted, curves)


def wanted_points(text: str) -> list[Point]:
    """`all`, or numbers and ranges such as 0-5,7."""
    everything = grid()
    if text == "all":
        return everything
    numbers = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return [everything[number] for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="all", help="numbers of points, as 0-5,7; default: all")
    parser.add_argument("--again", action="store_true", help="measure also points that the file has")
    parser.add_argument("--calibrate", action="store_true", help="calibrate the machine first")
    parser.add_argument("--predict", action="store_true", help="note predictions, measure nothing")
    parser.add_argument("--page", type=Path, help="write plan.md and plan.svg into this folder")
    parser.add_argument("--threads", type=int, default=num_allowed_cores())
    parser.add_argument("--scratch", type=Path, default=Path("runs/plan"), help="models and results")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    file = options.scratch / "points.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"points": {}}
    place = calibration_file(options.threads)
    if options.calibrate:
        from qnext.bench.calibrate import calibrate

        say = lambda text: print(text, file=sys.stderr)  # noqa: E731
        write_calibration(place, calibrate(date=str(date.today()), threads=options.threads, say=say))
    ops.set_num_threads(options.threads)
    calibration = read_calibration(place)
    if calibration is None:
        parser.error("no calibration of this machine: --calibrate")
    results |= {"machine": machine(), "threads": options.threads, "date": str(date.today())}
    results["calibration"] = calibration.told
    for point in wanted_points(options.points):
        row = results["points"].get(point.key, {})
        if "measured" in row and not options.again:
            continue
        folder = folder_of(point, options.scratch)
        row = {**point._asdict(), "predicted": predict(folder, point)}
        results["points"][point.key] = row
        write_file(file, json.dumps(results, indent=1))
        if options.predict:
            continue
        start = time.perf_counter()
        row["measured"] = measure(folder, point, options.threads)
        write_file(file, json.dumps(results, indent=1))
        off = ", ".join(
            f"{name} {shown(name, row['predicted'][name])} predicted, {shown(name, row['measured'][name])} measured "
            f"({row['predicted'][name] / row['measured'][name] - 1:+.0%})"
            for name in FIGURES
        )
        print(f"{point.key}: {off}; {time.perf_counter() - start:.0f} s", flush=True)
    if any("measured" in row for row in results["points"].values()):
        found = summary(results)
        for name, each in found.items():
            print(f"{name}: median error {each['median']:.1%}, limit {each['limit']:.0%}, worst {each['worst']:.0%}")
        if options.page is not None:
            options.page.mkdir(parents=True, exist_ok=True)
            page(results, options.page)
        print_json({"benchmark": "plan", "summary": found, **results})


if __name__ == "__main__":
    main()
