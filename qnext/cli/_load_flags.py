"""The flags of `qnext bench serve`, under the names that users of vLLM know."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_LOAD, _PROMPTS, _REPORT = "Load", "Prompts", "Report"


def _option(panel: str, *names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


Url = Annotated[str, typer.Option("--url", "--base-url", metavar="URL", help="The server.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Of the server's models; default: its first.")
]
Endpoint = Annotated[
    str, typer.Option("--endpoint", metavar="/v1/completions|/v1/chat/completions", help="The route that is asked.")
]
DatasetName = Annotated[
    str, _option(_PROMPTS, "--dataset-name", metavar="random|custom|sharegpt", help="Random ids, or a file.")
]
DatasetPath = Annotated[
    Path | None,
    _option(_PROMPTS, "--dataset-path", metavar="FILE", help="JSONL or JSON: prompt, or ShareGPT's conversations."),
]
RandomInputLen = Annotated[int, _option(_PROMPTS, "--random-input-len", help="Tokens of a prompt.")]
RandomOutputLen = Annotated[int, _option(_PROMPTS, "--random-output-len", help="Tokens of an answer.")]
RandomPrefixLen = Annotated[int, _option(_PROMPTS, "--random-prefix-len", help="More tokens before, the same for all.")]
RandomRangeRatio = Annotated[float, _option(_PROMPTS, "--random-range-ratio", help="Lengths vary by this share.")]
CustomOutputLen = Annotated[
    int, _option(_PROMPTS, "--custom-output-len", min=1, help="Of a file's prompts without output_tokens.")
]
NumPrompts = Annotated[int, _option(_PROMPTS, "--num-prompts", min=1, help="Requests of a run.")]
Seed = Annotated[int, _option(_PROMPTS, "--seed", help="Of prompts and times.")]
IgnoreEos = Annotated[bool, _option(_PROMPTS, "--ignore-eos", help="Answers have their full length.")]
Temperature = Annotated[float | None, _option(_PROMPTS, "--temperature", help="Default: the server's.")]
RequestRate = Annotated[float, _option(_LOAD, "--request-rate", help="A second; inf: all at once.")]
Burstiness = Annotated[
    float, _option(_LOAD, "--burstiness", help="1: a Poisson process; less: in bursts; more: evenly.")
]
MaxConcurrency = Annotated[
    int | None, _option(_LOAD, "--max-concurrency", min=1, help="Requests at once; others wait unsent.")
]
SweepConcurrency = Annotated[
    str | None, _option(_LOAD, "--sweep-concurrency", metavar="N,N,...", help="A run for each.")
]
SweepRate = Annotated[
    str | None, _option(_LOAD, "--sweep-rate", metavar="X,X,...", help="A run for each request rate.")
]
Warmups = Annotated[int, _option(_LOAD, "--warmups", "--num-warmups", min=0, help="Requests before, not counted.")]
PercentileMetrics = Annotated[str, _option(_REPORT, "--percentile-metrics", help="Those that the table shows.")]
MetricPercentiles = Annotated[
    str, _option(_REPORT, "--metric-percentiles", metavar="N,N,...", help="Which percentiles.")
]
Goodput = Annotated[
    list[str] | None,
    _option(_REPORT, "--goodput", help='Milliseconds of a good answer: "ttft:500 tpot:50"; repeatable.'),
]
AsJson = Annotated[bool, _option(_REPORT, "--json", help="One JSON document on stdout instead of a table.")]
SaveResult = Annotated[
    Path | None, _option(_REPORT, "--save-result", metavar="FILE", help="The document to a file, too.")
]
