"""The results of a load, as a document and as a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qnext.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from qnext.client.load import LoadOutcome, Timing, Workload

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between pieces",
    "e2el": "whole answer",
}
Goals = Mapping[str, float]  # metric -> milliseconds that an answer may take


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """
    >>> parse_goals(["ttft:500 tpot:50"])
    {'ttft': 500.0, 'tpot': 50.0}
    """
    goals: dict[str, float] = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, value = text.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            goals[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not goals[name] > 0:
            raise UsageError(f"--goodput {text}: must be ttft, tpot or e2el and milliseconds, such as ttft:500")
    return goals


def measured(load: Workload, outcome: LoadOutcome, *, goals: Goals, percentiles: Sequence[float]) -> dict[str, Any]:
    """The results of one run as a document: counts, rates per second, and times in milliseconds."""
    answered = [timing for timing in outcome.timings if timing.is_answered]
    errors = Counter(timing.error for timing in outcome.timings if timing.error is not None)
    num_input = sum(timing.num_prompt or 0 for timing in answered)
    num_output = sum(timing.output_tokens for timing in answered)
    seconds = outcome.seconds
    times = {
        "ttft": [timing.ttft for timing in answered],
        "tpot": [timing.tpot for timing in answered if timing.tpot is not None],
        "itl": [gap for timing in answered for gap in timing.gaps],
        "e2el": [timing.e2el for timing in answered],
    }
    document: dict[str, Any] = {
        "request_rate": load.rate if math.isfinite(load.rate) else None,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "duration_s": seconds,
        "completed": len(answered),
        "failed": len(outcome.timings) - len(answered),
        "errors": dict(errors.most_common(10)),
        "input_tokens": num_input,
        "output_tokens": num_output,
        "request_throughput": len(answered) / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "peak_concurrency": outcome.peak,
        "client_load": outcome.client_seconds / seconds,
        "latest_send_ms": 1000 * outcome.latest_send,
    }
    if goals:
        document["goodput"] = sum(_is_good(timing, goals) for timing in answered) / seconds
    for name, values in times.items():
        document[f"{name}_ms"] = _statistics([1000 * value for value in values], percentiles)
    return document


def _is_good(timing: Timing, goals: Goals) -> bool:
    found = {"ttft": timing.ttft, "tpot": timing.tpot or 0.0, "e2el": timing.e2el}
    return all(1000 * found[name] <= limit for name, limit in goals.items())


def _statistics(values: list[float], percentiles: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    import numpy

    found = {"mean": float(numpy.mean(values)), "std": float(numpy.std(values)), "max": max(values)}
    return found | {f"p{each:g}": float(numpy.percentile(values, each)) for each in percentiles}


def tables(document: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> list[Table]:
    """The text for a terminal: one run in full, or several runs one below the other."""
    from rich.table import Table

    runs: list[dict[str, Any]] = document["runs"]
    columns = [f"p{each:g}" for each in percentiles]
    if len(runs) > 1:
        summary = Table("load", "failed", "requests/s", "answer tokens/s", "client busy")
        for run in runs:
            summary.add_row(_load_name(run), str(run["failed"]), *_rates(run), f"{run['client_load']:.0%}")
        return [summary, *(_sweep_table(runs, metric, columns) for metric in metrics)]
    (run,) = runs
    summary = Table(show_header=False)
    for name, value in _lines(run).items():
        summary.add_row(name, value)
    times = Table("ms", "mean", *columns)
    for metric in metrics:
        cells = [_cell(run[f"{metric}_ms"], column) for column in ("mean", *columns)]
        times.add_row(f"{metric}, {METRICS[metric]}", *cells)
    return [summary, times]


def _sweep_table(runs: Sequence[Mapping[str, Any]], metric: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(f"{metric}, {METRICS[metric]}, ms", "mean", *columns)
    for run in runs:
        table.add_row(_load_name(run), *(_cell(run[f"{metric}_ms"], column) for column in ("mean", *columns)))
    return table


def _lines(run: Mapping[str, Any]) -> dict[str, str]:
    rate, tokens = _rates(run)
    found = {
        "load": _load_name(run),
        "requests": f"{run['completed']} answered, {run['failed']} failed in {run['duration_s']:.2f} s",
        "tokens": f"{run['input_tokens']} of prompts, {run['output_tokens']} of answers",
        "requests/s": rate,
        "answer tokens/s": tokens,
        "all tokens/s": f"{run['total_token_throughput']:.1f}",
        "at once, at most": str(run["peak_concurrency"]),
        "client": f"busy {run['client_load']:.0%} of the time, sent {run['latest_send_ms']:.0f} ms late at most",
    }
    if "goodput" in run:
        found["good requests/s"] = f"{run['goodput']:.2f}"
    return found | {f"error, {number} times": text for text, number in run["errors"].items()}


def _rates(run: Mapping[str, Any]) -> tuple[str, str]:
    return f"{run['request_throughput']:.2f}", f"{run['output_throughput']:.1f}"


def _load_name(run: Mapping[str, Any]) -> str:
    rate = [] if run["request_rate"] is None else [f"{run['request_rate']:g} requests/s"]
    bound = [] if run["max_concurrency"] is None else [f"{run['max_concurrency']} in flight"]
    return ", ".join(rate + bound) or "all at once"


def _cell(statistics: Mapping[str, float] | None, column: str) -> str:
    return "" if statistics is None else f"{statistics[column]:.2f}"
