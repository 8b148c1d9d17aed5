"""`qnext eval speed`: latency and throughput by context, of the first request after loading and sustained."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import TYPE_CHECKING, Annotated, Any

from qnext.cli.flags.examinee import ExamineeFlags, lengths_of
from qnext.cli.flags.values import AsJson, Model, Strict, option
from qnext.cli.terminal.text import note
from qnext.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qnext.client.load import LoadOutcome
    from qnext.client.load_prompts import LoadPrompt
    from qnext.session.llm import LLM

_PERCENTILES = (50, 90, 99)


def command(
    model: Model,
    *,
    contexts: Annotated[str, option("Tokens of a prompt, with commas.", metavar="512,4k")] = "512,2048",
    output_len: Annotated[int, option("Tokens of an answer.", min=2, metavar="N")] = 64,
    minutes: Annotated[float, option("Of sustained requests at each context.", min=0.0, metavar="X")] = 0.5,
    seed: Annotated[int, option("Of the prompts.", metavar="N")] = 0,
    loaded: ExamineeFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Load the model anew for each context, time the first request, then requests one after another for some minutes.

    Prompts are random tokens, so that no cache holds them. Drift is the median time per token of the last third of the
    requests over that of the first: above 1 the machine got slower, by heat or by others. Several users at once:
    `qnext bench serve`. Beside other programs: `qnext bench`.
    """
    if loaded.url is not None:
        raise UsageError("--url: a server is measured by `qnext bench serve`")
    rows = [
        _measure(model, length, loaded, output_len=output_len, seconds=60 * minutes, seed=seed)
        for length in lengths_of(contexts, flag="--contexts")
    ]
    print(json.dumps({"model": model, "output_len": output_len, "rows": rows}) if as_json else _table(rows))


def _measure(
    model: str, length: int, loaded: ExamineeFlags, *, output_len: int, seconds: float, seed: int
) -> dict[str, Any]:
    from qnext.client.load import COMPLETIONS, Workload
    from qnext.client.load_report import measured
    from qnext.client.local_load import run_local

    begun = time.perf_counter()
    with loaded.llm(model) as llm:
        load_seconds = time.perf_counter() - begun
        if length + output_len > llm.engine.max_model_len:
            raise UsageError(f"--contexts {length}: prompt and answer are beyond {llm.engine.max_model_len} tokens")
        note(f"{length} tokens: loaded in {load_seconds:.1f} s")
        stream = _stream_of(llm)
        prompts = _prompts(length, output_len, llm.config.vocab_size, seed)
        cold = run_local(stream, [next(prompts)])
        sustained = run_local(stream, prompts, seconds=seconds)
    load = Workload(COMPLETIONS, max_concurrency=1, seed=seed)
    first, others = (measured(load, each, goals={}, percentiles=_PERCENTILES) for each in (cold, sustained))
    return {
        "context": length,
        "load_seconds": load_seconds,
        "cold": first,
        "sustained": others,
        "drift": _drift(sustained),
    }


def _stream_of(llm: LLM) -> Any:
    from qnext.engine import SamplingParams

    def stream(token_ids: Sequence[int], max_tokens: int) -> Iterator[object]:
        yield from llm.engine.stream(token_ids, SamplingParams(max_tokens=max_tokens, ignore_eos=True))

    return stream


def _prompts(length: int, output_len: int, vocab_size: int, seed: int) -> Iterator[LoadPrompt]:
    from qnext.client.load_prompts import RandomPrompts

    shape = RandomPrompts(length, output_len)
    source = random.Random(seed)
    for _ in itertools.count():
        yield from shape.make(1, range(vocab_size), seed=source.getrandbits(32))


def _drift(outcome: LoadOutcome) -> float | None:
    """None for fewer than six requests."""
    times = [timing.tpot for timing in outcome.timings if timing.tpot is not None]
    third = len(times) // 3
    if third < 2:
        return None
    early, late = sorted(times[:third]), sorted(times[-third:])
    return late[third // 2] / early[third // 2]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'context':>8} {'load s':>7} {'first: TTFT ms':>15} {'ITL ms':>8}   {'then: TTFT p50':>15} {'p90':>9} "
        f"{'ITL p50':>8} {'p99':>8} {'tokens/s':>9} {'requests':>9} {'drift':>6}"
    ]
    for row in rows:
        cold, then = row["cold"], row["sustained"]
        drift = "" if row["drift"] is None else f"{row['drift']:.2f}"
        lines.append(
            f"{row['context']:>8} {row['load_seconds']:7.1f} {cold['ttft_ms']['p50']:15.1f} "
            f"{cold['itl_ms']['p50']:8.2f}   {then['ttft_ms']['p50']:15.1f} {then['ttft_ms']['p90']:9.1f} "
            f"{then['itl_ms']['p50']:8.2f} {then['itl_ms']['p99']:8.2f} {then['output_throughput']:9.1f} "
            f"{then['completed']:>9} {drift:>6}"
        )
    return "\n".join(lines)
