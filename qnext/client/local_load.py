"""The times of requests to a model of this process, as those of a load on a server, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from qnext.client.load import LoadOutcome, Timing
from qnext.client.load_prompts import LoadPrompt

Stream = Callable[[Sequence[int], int], Iterable[object]]  # token ids, most tokens -> the answer, piece by piece


def run_local(stream: Stream, prompts: Iterable[LoadPrompt], *, seconds: float | None = None) -> LoadOutcome:
    """All prompts, or as many as begin within `seconds`; at least one."""
    timings: list[Timing] = []
    begun, busy = time.perf_counter(), time.process_time()
    for prompt in prompts:
        timings.append(_timed(stream, prompt))
        if seconds is not None and time.perf_counter() - begun >= seconds:
            break
    return LoadOutcome(
        timings,
        time.perf_counter() - begun,
        peak=1,
        client_seconds=time.process_time() - busy,
        latest_send=0.0,
    )


def _timed(stream: Stream, prompt: LoadPrompt) -> Timing:
    assert not isinstance(prompt.content, str)
    timing = Timing(began=time.perf_counter(), num_prompt=len(prompt.content))
    for _ in stream(prompt.content, prompt.num_output):
        timing.tick()
    return timing
