"""`qnext bench serve`: a load on a running server, and how it takes it."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qnext.cli import _load_flags as flags
from qnext.cli._remote import ApiKey
from qnext.errors import UsageError
from qnext.files import write_file

if TYPE_CHECKING:
    from qnext.cli._load import Load, Timing
    from qnext.cli._load_prompts import Prompt, RandomPrompts


def command(
    url: flags.Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    model: flags.Model = None,
    endpoint: flags.Endpoint = "/v1/completions",
    dataset_name: flags.DatasetName = "random",
    dataset_path: flags.DatasetPath = None,
    random_input_len: flags.RandomInputLen = 1024,
    random_output_len: flags.RandomOutputLen = 128,
    random_prefix_len: flags.RandomPrefixLen = 0,
    random_range_ratio: flags.RandomRangeRatio = 0.0,
    custom_output_len: flags.CustomOutputLen = 256,
    num_prompts: flags.NumPrompts = 100,
    seed: flags.Seed = 0,
    ignore_eos: flags.IgnoreEos = False,
    temperature: flags.Temperature = None,
    request_rate: flags.RequestRate = math.inf,
    burstiness: flags.Burstiness = 1.0,
    max_concurrency: flags.MaxConcurrency = None,
    sweep_concurrency: flags.SweepConcurrency = None,
    sweep_rate: flags.SweepRate = None,
    warmups: flags.Warmups = 0,
    percentile_metrics: flags.PercentileMetrics = "ttft,tpot,itl,e2el",
    metric_percentiles: flags.MetricPercentiles = "50,90,99",
    goodput: flags.Goodput = None,
    as_json: flags.AsJson = False,
    save_result: flags.SaveResult = None,
) -> None:
    """Send requests to a running server and time every answer, token by token.

    Random prompts are token ids, so that their lengths are exact; each run of a sweep has prompts of its own, which no
    cache holds yet. A request's clock starts when it is sent. Times between pieces are those of pieces of the stream,
    which may hold several tokens. Exits with 1 when no request was answered.
    """
    from qnext.cli._load import CHAT, COMPLETIONS, Load
    from qnext.cli._load_prompts import RandomPrompts
    from qnext.cli._load_report import METRICS, parse_goals
    from qnext.cli._remote import headers_of, model_of, root_of

    goals, percentiles = parse_goals(goodput or []), _percentiles(metric_percentiles)
    metrics = percentile_metrics.split(",")
    if not set(metrics) <= set(METRICS):
        raise UsageError(f"--percentile-metrics {percentile_metrics}: must be of {','.join(METRICS)}")
    if endpoint not in (CHAT, COMPLETIONS):
        raise UsageError(f"--endpoint {endpoint}: must be {COMPLETIONS} or {CHAT}")
    if not (request_rate > 0 and burstiness > 0):
        raise UsageError("--request-rate and --burstiness must be positive")
    if dataset_name not in ("random", "custom", "sharegpt") or (dataset_name == "random") != (dataset_path is None):
        raise UsageError("--dataset-name is random, or custom or sharegpt with --dataset-path")
    if sweep_concurrency and sweep_rate:
        raise UsageError("--sweep-concurrency and --sweep-rate exclude each other")
    shape = RandomPrompts(random_input_len, random_output_len, random_prefix_len, random_range_ratio)
    load = Load(endpoint, request_rate, burstiness, max_concurrency, seed)
    loads = _sweep(load, sweep_concurrency, sweep_rate)
    root = root_of(url)
    name = model_of(root, api_key, model)
    body: dict[str, Any] = {"model": name}
    body |= {"ignore_eos": True} if ignore_eos else {}
    body |= {} if temperature is None else {"temperature": temperature}
    loads = [replace(each, body=body) for each in loads]
    with _prompt_source(root, headers_of(api_key), name, load, shape, dataset_path, custom_output_len) as prompts_of:
        runs = _measure(
            root, headers_of(api_key), loads, prompts_of, num_prompts=num_prompts, warmups=warmups, goals=goals,
            percentiles=percentiles,
        )  # fmt: skip
    document = {
        "url": root, "model": name, "endpoint": endpoint, "dataset": dataset_name, "num_prompts": num_prompts,
        "seed": seed, "goals_ms": goals, "runs": runs,
    }  # fmt: skip
    _show(document, metrics, percentiles, as_json=as_json)
    if save_result is not None:
        write_file(save_result, json.dumps(document, indent=2) + "\n")
    raise typer.Exit(0 if any(run["completed"] for run in runs) else 1)


@contextmanager
def _prompt_source(
    root: str,
    headers: dict[str, str],
    model: str,
    load: Load,
    shape: RandomPrompts,
    path: Path | None,
    output_len: int,
) -> Iterator[Callable[[int, int], list[Prompt]]]:
    """A function (number, seed) -> prompts."""
    import httpx2

    from qnext.cli._load import CHAT
    from qnext.cli._load_prompts import PromptServer, prompts_of_file

    if path is not None:
        yield lambda number, seed: prompts_of_file(path, number, output_len=output_len, seed=seed)
        return
    with httpx2.Client(base_url=root, headers=headers, timeout=60.0) as client:
        server = PromptServer(client, model)
        vocabulary = server.vocabulary()

        def prompts_of(number: int, seed: int) -> list[Prompt]:
            prompts = shape.make(number, vocabulary, seed=seed)
            return [server.as_text(prompt) for prompt in prompts] if load.endpoint == CHAT else prompts

        yield prompts_of


def _measure(
    root: str,
    headers: dict[str, str],
    loads: list[Load],
    prompts_of: Callable[[int, int], list[Prompt]],
    *,
    num_prompts: int,
    warmups: int,
    goals: dict[str, float],
    percentiles: list[float],
) -> list[dict[str, Any]]:
    from qnext.cli._load import run_load
    from qnext.cli._load_report import measured

    if warmups:
        first = replace(loads[0], rate=math.inf, max_concurrency=loads[0].max_concurrency or 1)
        run_load(root, headers, first, prompts_of(warmups, loads[0].seed - 1))
    runs: list[dict[str, Any]] = []
    for index, load in enumerate(loads):
        prompts = prompts_of(num_prompts, load.seed + index)
        with _progress(f"run {index + 1} of {len(loads)}", num_prompts) as on_answer:
            outcome = run_load(root, headers, load, prompts, on_answer=on_answer)
        runs.append(measured(load, outcome, goals=goals, percentiles=percentiles))
    return runs


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[Timing], None] | None]:
    """A bar on stderr where that is a terminal; drawn four times a second, so that it costs the measurement little."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as bar:
        task = bar.add_task(label, total=total)
        yield lambda timing: bar.advance(task)


def _show(document: dict[str, Any], metrics: list[str], percentiles: list[float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(document), flush=True)
        return
    from rich.console import Console

    from qnext.cli._load_report import tables

    console = Console(no_color="NO_COLOR" in os.environ or None, width=None if sys.stdout.isatty() else 160)
    for table in tables(document, metrics, percentiles):
        console.print(table)


def _sweep(load: Load, concurrencies: str | None, rates: str | None) -> list[Load]:
    if concurrencies is not None:
        numbers = _numbers("--sweep-concurrency", concurrencies)
        if any(number != int(number) for number in numbers):
            raise UsageError(f"--sweep-concurrency {concurrencies}: must be whole numbers")
        return [replace(load, max_concurrency=int(number)) for number in numbers]
    if rates is not None:
        return [replace(load, rate=rate) for rate in _numbers("--sweep-rate", rates)]
    return [load]


def _percentiles(text: str) -> list[float]:
    found = _numbers("--metric-percentiles", text)
    if max(found) > 100:
        raise UsageError(f"--metric-percentiles {text}: must be at most 100")
    return found


def _numbers(flag: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(number > 0 and math.isfinite(number) for number in found):
        raise UsageError(f"{flag} {text}: must be positive numbers, such as 1,4,16")
    return found
