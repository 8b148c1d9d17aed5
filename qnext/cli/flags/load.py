"""The flags of `qnext bench serve`, under the names that users of vLLM know."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.flags.values import panel
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.client.load import Workload
    from qnext.client.load_prompts import RandomPrompts
    from qnext.client.load_runs import LoadRuns

_load, _prompts, _report = panel("Load"), panel("Prompts"), panel("Report")

ServerUrl = Annotated[str, typer.Option("--url", "--base-url", metavar="URL", help="The server.")]
ServedModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Of the server's models; default: its first.")
]
AskedRoute = Annotated[
    str, typer.Option("--endpoint", metavar="/v1/completions|/v1/chat/completions", help="The route that is asked.")
]


@dataclass(frozen=True)
class PromptFlags:
    """What is asked, and how often."""

    dataset_name: Annotated[str, _prompts("Random ids, or a file.", metavar="random|custom|sharegpt")] = "random"
    dataset_path: Annotated[
        Path | None, _prompts("JSONL or JSON: prompt, or ShareGPT's conversations.", metavar="FILE")
    ] = None
    random_input_len: Annotated[int, _prompts("Tokens of a prompt.")] = 1024
    random_output_len: Annotated[int, _prompts("Tokens of an answer.")] = 128
    random_prefix_len: Annotated[int, _prompts("More tokens before, the same for all.")] = 0
    random_range_ratio: Annotated[float, _prompts("Lengths vary by this share.")] = 0.0
    custom_output_len: Annotated[int, _prompts("Of a file's prompts without output_tokens.", min=1)] = 256
    num_prompts: Annotated[int, _prompts("Requests of a run.", min=1)] = 100
    seed: Annotated[int, _prompts("Of prompts and times.")] = 0
    ignore_eos: Annotated[bool, _prompts("Answers have their full length.", "--ignore-eos")] = False
    temperature: Annotated[float | None, _prompts("Default: the server's.")] = None

    def shape(self) -> RandomPrompts:
        """Raises UsageError for a dataset that is none, and for lengths that cannot be."""
        from qnext.client.load_prompts import RandomPrompts

        is_random = self.dataset_name == "random"
        if self.dataset_name not in ("random", "custom", "sharegpt") or is_random != (self.dataset_path is None):
            raise UsageError("--dataset-name is random, or custom or sharegpt with --dataset-path")
        return RandomPrompts(
            self.random_input_len, self.random_output_len, self.random_prefix_len, self.random_range_ratio
        )

    def body(self, model: str) -> dict[str, Any]:
        """What each request says beside its prompt."""
        ignore = {"ignore_eos": True} if self.ignore_eos else {}
        warm = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": model, **ignore, **warm}


@dataclass(frozen=True)
class LoadFlags:
    """When requests are sent."""

    request_rate: Annotated[float, _load("A second; inf: all at once.")] = math.inf
    burstiness: Annotated[float, _load("1: a Poisson process; less: in bursts; more: evenly.")] = 1.0
    max_concurrency: Annotated[int | None, _load("Requests at once; others wait unsent.", min=1)] = None
    sweep_concurrency: Annotated[str | None, _load("A run for each.", metavar="N,N,...")] = None
    sweep_rate: Annotated[str | None, _load("A run for each request rate.", metavar="X,X,...")] = None
    warmups: Annotated[int, _load("Requests before, not counted.", "--warmups", "--num-warmups", min=0)] = 0

    def workloads(self, endpoint: str, *, seed: int) -> list[Workload]:
        """One for each run. Raises UsageError."""
        from qnext.client.load import CHAT, COMPLETIONS, Workload

        if endpoint not in (CHAT, COMPLETIONS):
            raise UsageError(f"--endpoint {endpoint}: must be {COMPLETIONS} or {CHAT}")
        if not (self.request_rate > 0 and self.burstiness > 0):
            raise UsageError("--request-rate and --burstiness must be positive")
        if self.sweep_concurrency and self.sweep_rate:
            raise UsageError("--sweep-concurrency and --sweep-rate exclude each other")
        load = Workload(endpoint, self.request_rate, self.burstiness, self.max_concurrency, seed)
        if self.sweep_concurrency is not None:
            numbers = _numbers("--sweep-concurrency", self.sweep_concurrency)
            if any(number != int(number) for number in numbers):
                raise UsageError(f"--sweep-concurrency {self.sweep_concurrency}: must be whole numbers")
            return [replace(load, max_concurrency=int(number)) for number in numbers]
        if self.sweep_rate is not None:
            return [replace(load, rate=rate) for rate in _numbers("--sweep-rate", self.sweep_rate)]
        return [load]


@dataclass(frozen=True)
class ReportFlags:
    """Which figures are shown, and where they go."""

    percentile_metrics: Annotated[str, _report("Those that the table shows.")] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[str, _report("Which percentiles.", metavar="N,N,...")] = "50,90,99"
    goodput: Annotated[list[str] | None, _report('Milliseconds of a good answer: "ttft:500 tpot:50"; repeatable.')] = (
        None
    )
    as_json: Annotated[bool, _report("One JSON document on stdout instead of a table.", "--json")] = False
    save_result: Annotated[Path | None, _report("The document to a file, too.", metavar="FILE")] = None

    @property
    def metrics(self) -> list[str]:
        """Raises UsageError for a metric that there is not."""
        from qnext.client.load_report import METRICS

        found = self.percentile_metrics.split(",")
        if not set(found) <= set(METRICS):
            raise UsageError(f"--percentile-metrics {self.percentile_metrics}: must be of {','.join(METRICS)}")
        return found

    def runs(self, *, num_prompts: int, warmups: int) -> LoadRuns:
        """Raises UsageError for goals or percentiles that cannot be."""
        from qnext.client.load_report import parse_goals
        from qnext.client.load_runs import LoadRuns

        percentiles = _numbers("--metric-percentiles", self.metric_percentiles)
        if max(percentiles) > 100:
            raise UsageError(f"--metric-percentiles {self.metric_percentiles}: must be at most 100")
        return LoadRuns(num_prompts, warmups, parse_goals(self.goodput or []), percentiles)


def _numbers(flag: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(number > 0 and math.isfinite(number) for number in found):
        raise UsageError(f"{flag} {text}: must be positive numbers, such as 1,4,16")
    return found
