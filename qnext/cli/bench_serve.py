"""`qnext bench serve`: a load on a running server, and how it takes it."""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from qnext.cli.flags import load as flags
from qnext.cli.flags.values import ApiKey
from qnext.cli.terminal.progress import count_progress
from qnext.files import write_file

if TYPE_CHECKING:
    from qnext.client.load_runs import PromptsOf


def command(
    *,
    url: flags.ServerUrl = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    model: flags.ServedModelName = None,
    endpoint: flags.AskedRoute = "/v1/completions",
    asked: flags.PromptFlags,
    load: flags.LoadFlags,
    report: flags.ReportFlags,
) -> None:
    """Send requests to a running server and time every answer, token by token.

    Random prompts are token ids, so that their lengths are exact; each run of a sweep has prompts of its own, which no
    cache holds yet. A request's clock starts when it is sent. Times between pieces are those of pieces of the stream,
    which may hold several tokens. Exits with 1 when no request was answered.
    """
    from qnext.client.load_runs import LoadTarget, file_prompts, random_prompts
    from qnext.client.remote import headers_of, model_of, root_of

    runs = report.runs(num_prompts=asked.num_prompts, warmups=load.warmups)
    metrics = report.metrics
    loads, shape = load.workloads(endpoint, seed=asked.seed), asked.shape()
    root = root_of(url)
    target = LoadTarget(root, headers_of(api_key), model_of(root, api_key, model))
    loads = [replace(each, body=asked.body(target.model)) for each in loads]
    source: AbstractContextManager[PromptsOf]
    if asked.dataset_path is None:
        source = random_prompts(target, shape, endpoint=endpoint)
    else:
        source = nullcontext(file_prompts(asked.dataset_path, output_len=asked.custom_output_len))
    with source as prompts_of:
        results = runs.measure(target, loads, prompts_of, progress=count_progress)
    document = {
        "url": root,
        "model": target.model,
        "endpoint": endpoint,
        "dataset": asked.dataset_name,
        "num_prompts": asked.num_prompts,
        "seed": asked.seed,
        "goals_ms": runs.goals,
        "runs": results,
    }
    if report.as_json:
        print(json.dumps(document), flush=True)
    else:
        _show(document, metrics, runs.percentiles)
    if report.save_result is not None:
        write_file(report.save_result, json.dumps(document, indent=2) + "\n")
    raise typer.Exit(0 if any(run["completed"] for run in results) else 1)


def _show(document: dict[str, Any], metrics: list[str], percentiles: Any) -> None:
    from rich.console import Console

    from qnext.client.load_report import tables

    console = Console(no_color="NO_COLOR" in os.environ or None, width=None if sys.stdout.isatty() else 160)
    for table in tables(document, metrics, percentiles):
        console.print(table)
