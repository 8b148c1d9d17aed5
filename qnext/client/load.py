"""A load on a server. One event loop sends requests at their times and times each answer token by token."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import orjson

from qnext.client.load_prompts import LoadPrompt
from qnext.client.remote import error_message

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_CONNECT_SECONDS = 60.0
_DELTAS = ("content", "reasoning_content", "reasoning", "tool_calls")


@dataclass(frozen=True)
class Workload:
    """How requests are sent. `rate` is requests per second; math.inf sends all at once.

    `burstiness` 1 is a Poisson process. A smaller value sends in bursts, a larger value sends evenly. `max_concurrency`
    None is no bound. `body` is added to each request.
    """

    endpoint: str
    rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    seed: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    """The times of one request in seconds. The times of a failed request mean nothing."""

    began: float = 0.0
    error: str | None = None
    first: float | None = None  # on time.perf_counter, as `began`
    last: float | None = None
    gaps: list[float] = field(default_factory=list)  # between pieces of the answer
    num_pieces: int = 0
    num_prompt: int | None = None
    num_output: int | None = None

    @property
    def is_answered(self) -> bool:
        return self.error is None

    @property
    def ttft(self) -> float:
        assert self.first is not None
        return self.first - self.began

    @property
    def e2el(self) -> float:
        assert self.last is not None
        return self.last - self.began

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is only one token."""
        assert self.first is not None and self.last is not None
        tokens = self.output_tokens
        return (self.last - self.first) / (tokens - 1) if tokens > 1 else None

    @property
    def output_tokens(self) -> int:
        """Tokens as the server counts them, or the number of pieces where the server reports no count."""
        return self.num_pieces if self.num_output is None else self.num_output

    def tick(self) -> None:
        now = time.perf_counter()
        if self.last is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.num_pieces += 1


@dataclass
class LoadOutcome:
    """All requests of one run, the processor time of the client, and its greatest delay in sending."""

    timings: list[Timing]
    seconds: float
    client_seconds: float  # of processor time, of this process
    latest_send: float  # seconds behind its time
    peak: int  # requests at once


def run_load(
    root: str,
    headers: Mapping[str, str],
    load: Workload,
    prompts: Sequence[LoadPrompt],
    *,
    on_answer: Callable[[Timing], object] | None = None,
) -> LoadOutcome:
    """Send all prompts and wait for every answer."""
    return asyncio.run(_run(root, headers, load, prompts, on_answer))


async def _run(
    root: str,
    headers: Mapping[str, str],
    load: Workload,
    prompts: Sequence[LoadPrompt],
    on_answer: Callable[[Timing], object] | None,
) -> LoadOutcome:
    timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    gate = asyncio.Semaphore(load.max_concurrency or max(1, len(prompts)))
    running = peak = 0
    timings: list[Timing] = []
    all_headers = {**headers, "Accept-Encoding": "identity"}
    async with httpx2.AsyncClient(base_url=root, headers=all_headers, timeout=timeout, limits=limits) as client:

        async def one(prompt: LoadPrompt) -> None:
            nonlocal running, peak
            body = orjson.dumps(_body(load, prompt))
            async with gate:
                running += 1
                peak = max(peak, running)
                timing = await _timed(client, load.endpoint, body)
                running -= 1
            timings.append(timing)
            if on_answer is not None:
                on_answer(timing)

        began, client_began = time.perf_counter(), time.process_time()
        latest = 0.0
        tasks: list[asyncio.Task[None]] = []
        for prompt, due in zip(prompts, arrivals(load), strict=False):
            wait = began + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if math.isfinite(load.rate):
                latest = max(latest, time.perf_counter() - began - due)
            tasks.append(asyncio.create_task(one(prompt)))
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
    return LoadOutcome(timings, seconds, time.process_time() - client_began, latest, peak)


def arrivals(load: Workload) -> Iterator[float]:
    """Endless times in seconds at which requests are due. The gaps have a gamma distribution with mean 1 / rate."""
    chance = random.Random(load.seed)
    due = 0.0
    while True:
        yield due
        if math.isfinite(load.rate):
            due += chance.gammavariate(load.burstiness, 1 / (load.rate * load.burstiness))


def _body(load: Workload, prompt: LoadPrompt) -> dict[str, Any]:
    body = {"max_tokens": prompt.num_output, "stream": True, "stream_options": {"include_usage": True}, **load.body}
    if load.endpoint == CHAT:
        return {**body, "messages": [{"role": "user", "content": prompt.content}]}
    return {**body, "prompt": prompt.content}


async def _timed(client: httpx2.AsyncClient, path: str, body: bytes) -> Timing:
    timing = Timing(began=time.perf_counter())
    try:
        async with client.stream("POST", path, content=body) as response:
            if response.status_code != 200:
                timing.error = f"{response.status_code}: {error_message(await response.aread())}"
                return timing
            rest = b""
            async for piece in response.aiter_raw():
                *frames, rest = (rest + piece).split(b"\n\n")
                for frame in frames:
                    _take(timing, frame)
    except (httpx2.HTTPError, orjson.JSONDecodeError) as error:
        timing.error = f"{type(error).__name__}: {error}".rstrip(": ")
    if timing.error is None and timing.first is None:
        timing.error = "an answer without a token"
    return timing


def _take(timing: Timing, frame: bytes) -> None:
    if not frame.startswith(b"data:") or frame == b"data: [DONE]":
        return
    document = orjson.loads(frame[5:])
    if not isinstance(document, dict):
        return
    if document.get("error"):
        timing.error = f"in the stream: {error_message(frame[5:])}"
        return
    if any(_has_token(choice) for choice in document.get("choices") or ()):
        timing.tick()
    usage = document.get("usage")
    if usage:
        timing.num_prompt, timing.num_output = usage.get("prompt_tokens"), usage.get("completion_tokens")


def _has_token(choice: Mapping[str, Any]) -> bool:
    """Whether a piece tells of a token: in completions a token may have no text yet, but only the end has a reason."""
    delta = choice.get("delta")
    if delta is not None:
        return any(delta.get(name) for name in _DELTAS)
    return bool(choice.get("text")) or not choice.get("finish_reason")
