"""What an engine has done and how long it took, counted while it works. No torch."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from qnext.engine.execution.expert_reads import ExpertReads
from qnext.engine.policy.prefix import PrefixStatistics
from qnext.engine.policy.request import Request, SampledToken
from qnext.engine.policy.scheduler import Scheduler
from qnext.engine.policy.step import SequencePlan, StepPlan, TokenEvent

if TYPE_CHECKING:
    from qnext.engine.execution.expert_load import ExpertCounter, ExpertCounts

# 1, 2.5 and 5 of every decade from a millisecond to a thousand seconds
REQUEST_SECONDS = (*(n * 10**e / 10_000 for e in range(6) for n in (10, 25, 50)), 1000.0)
# finer where tokens come: 1 to 700 ms, then seconds
TOKEN_SECONDS = (*(n * 10**e / 10_000 for e in range(3) for n in (10, 15, 20, 30, 50, 70)), 1.0, 2.5, 5.0, 10.0)
STEP_TOKENS = tuple(float(2**e) for e in range(14))  # 1 to 8,192

_NO_STATISTICS = vars(PrefixStatistics())


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last count is of all above the last.

    Counts are not cumulative.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class FinishCounts:
    """Requests that ended, by their finish reason."""

    stop: int = 0
    length: int = 0
    abort: int = 0
    error: int = 0
    deadline: int = 0


@dataclass(frozen=True)
class Gauges:
    """What the engine holds at the moment. Blocks and slots in use are those of requests and of cached prefixes."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    num_blocks_cached: int  # that cached prefixes hold, alone or together with requests
    num_slots_used: int
    num_slots: int
    num_slots_running: int
    num_slots_cached: int  # each the state after one cached prefix


@dataclass(frozen=True)
class EngineMetrics:
    """An engine's counters since it was made, which only grow, its gauges, and its distributions; times in seconds.

    All numbers are plain Python's, and nothing changes them later. A step that failed ends its requests and brings no
    tokens.
    """

    num_requests: int
    """That were queued."""

    finished: FinishCounts
    num_steps: int
    prompt_tokens_computed: int
    """Those that are computed again after a preemption count again."""

    prompt_tokens_cached: int
    """Found in the cache when a request was first admitted."""

    output_tokens: int
    drafted_tokens: int
    """Drafted tokens count when they are verified."""

    accepted_tokens: int
    """Drafted ones that the answer got."""

    num_preemptions: int
    step_tokens: Histogram
    """Tokens per step; their sum is the tokens computed."""

    queue_time: Histogram
    """From a request's arrival to its first step."""

    time_to_first_token: Histogram
    """From a request's arrival."""

    inter_token_latency: Histogram
    """Between tokens of a request; zero for those that one step brought together."""

    end_to_end_time: Histogram
    """Of requests that came to their end by "stop" or "length"."""

    gauges: Gauges
    prefix: PrefixStatistics
    """A copy; zeros without a prefix cache."""

    experts: ExpertReads | None
    """Of those on disk; None where all are in memory."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class MetricsRecorder:
    """Keeps the metrics of one engine, which tells it of every event, and writes the times of its requests.

    Changes and copies are made under a lock that is held for microseconds and never while the model computes. So any
    thread may take a snapshot at any time: it shows the engine as it was after the last event, never half of a step.
    """

    def __init__(
        self, scheduler: Scheduler, experts: ExpertCounter | None, expert_reads: Callable[[], ExpertReads | None]
    ) -> None:
        self._scheduler = scheduler
        self._experts = experts
        self._expert_reads = expert_reads
        self._reads = expert_reads()
        self._lock = Lock()
        self._counts: Counter[str] = Counter()  # by field of EngineMetrics
        self._finished: Counter[str] = Counter()
        self._step_tokens = _Distribution(STEP_TOKENS)
        self._queue_time = _Distribution(REQUEST_SECONDS)
        self._time_to_first_token = _Distribution(REQUEST_SECONDS)
        self._inter_token_latency = _Distribution(TOKEN_SECONDS)
        self._end_to_end_time = _Distribution(REQUEST_SECONDS)
        self._observe_scheduler()

    # ---- what the engine tells ----

    def add_request(self) -> None:
        with self._lock:
            self._counts["num_requests"] += 1
            self._observe_scheduler()

    def begin_step(self, requests: Iterable[Request]) -> None:
        """These are to run."""
        now = time.monotonic()
        for request in requests:
            if request.times.scheduled is None:
                request.times.scheduled = now
                with self._lock:
                    self._queue_time.observe(now - request.times.arrived)
                    self._counts["prompt_tokens_cached"] += request.num_cached_tokens or 0

    def end_step(
        self,
        plan: StepPlan,
        tokens: Mapping[str, Sequence[SampledToken]],
        events: Sequence[TokenEvent],
        requests: Mapping[str, Request],
    ) -> None:
        """The step is committed: `tokens` were chosen, `events` are those of them that `requests` got, which are all of
        the step by id. Those that have a `failure` ended with it."""
        now = time.monotonic()
        with self._lock:
            for sequence in plan.sequences:
                request = requests[sequence.request_id]
                self._count_sequence(sequence, request, tokens)
                if request.failure is not None:
                    self._count_end(request, now)
            self._counts["output_tokens"] += len(events)
            for event in events:
                self._count_token(requests[event.request_id], now)
                if event.finish_reason is not None:
                    self._count_end(requests[event.request_id], now)
                    self._end_to_end_time.observe(now - requests[event.request_id].times.arrived)
            if plan.sequences:
                self._counts["num_steps"] += 1
                self._step_tokens.observe(sum(len(sequence.token_ids) for sequence in plan.sequences))
                if self._experts is not None:
                    self._experts.end_step()
            self._reads = self._expert_reads()
            self._observe_scheduler()

    def fail_step(self, requests: Iterable[Request]) -> None:
        """The step raised, and its requests ended."""
        now = time.monotonic()
        with self._lock:
            for request in requests:
                self._count_end(request, now)
            if self._experts is not None:
                self._experts.drop_step()
            self._reads = self._expert_reads()
            self._observe_scheduler()

    def end_request(self, request: Request) -> None:
        """It ended between two steps."""
        with self._lock:
            self._count_end(request, time.monotonic())
            self._observe_scheduler()

    def rest_request(self) -> None:
        """One was parked or resumed."""
        with self._lock:
            self._observe_scheduler()

    # ---- what others ask ----

    def snapshot(self) -> EngineMetrics:
        with self._lock:
            counts = self._counts
            return EngineMetrics(
                num_requests=counts["num_requests"],
                finished=FinishCounts(**self._finished),
                num_steps=counts["num_steps"],
                prompt_tokens_computed=counts["prompt_tokens_computed"],
                prompt_tokens_cached=counts["prompt_tokens_cached"],
                output_tokens=counts["output_tokens"],
                drafted_tokens=counts["drafted_tokens"],
                accepted_tokens=counts["accepted_tokens"],
                num_preemptions=self._num_preemptions,
                step_tokens=self._step_tokens.snapshot(),
                queue_time=self._queue_time.snapshot(),
                time_to_first_token=self._time_to_first_token.snapshot(),
                inter_token_latency=self._inter_token_latency.snapshot(),
                end_to_end_time=self._end_to_end_time.snapshot(),
                gauges=Gauges(*self._gauges),
                prefix=PrefixStatistics(**self._prefix),
                experts=self._reads,
            )

    def expert_counts(self, num_steps: int) -> ExpertCounts | None:
        if self._experts is None:
            return None
        with self._lock:
            return self._experts.copy(num_steps)

    # ---- under the lock ----

    def _count_sequence(
        self, sequence: SequencePlan, request: Request, tokens: Mapping[str, Sequence[SampledToken]]
    ) -> None:
        start, num_prompt, drafts = sequence.start, sequence.num_prompt, sequence.drafts
        if start < num_prompt:
            self._counts["prompt_tokens_computed"] += min(start + len(sequence.token_ids), num_prompt) - start
        if drafts:
            chosen = () if request.failure is not None else tokens[request.id]
            num_accepted = sum(token.token_id == draft for token, draft in zip(chosen, drafts, strict=False))
            request.num_drafted += len(drafts)
            request.num_accepted += num_accepted
            self._counts["drafted_tokens"] += len(drafts)
            self._counts["accepted_tokens"] += num_accepted

    def _count_token(self, request: Request, now: float) -> None:
        times = request.times
        if times.last_token is None:
            times.first_token = now
            self._time_to_first_token.observe(now - times.arrived)
        else:
            self._inter_token_latency.observe(now - times.last_token)
        times.last_token = now

    def _count_end(self, request: Request, now: float) -> None:
        assert request.finish_reason is not None
        request.times.finished = now
        self._finished[request.finish_reason] += 1

    def _observe_scheduler(self) -> None:
        # After every step: only copies here, their names in `snapshot`.
        scheduler = self._scheduler
        blocks, slots, prefixes = scheduler.blocks, scheduler.slots, scheduler.prefixes
        self._num_preemptions = scheduler.num_preemptions
        self._prefix = _NO_STATISTICS if prefixes is None else vars(prefixes.statistics).copy()
        self._gauges = (
            scheduler.num_running,
            scheduler.num_waiting + scheduler.num_parked,
            blocks.num_used,
            blocks.size,
            0 if prefixes is None else prefixes.num_blocks,
            slots.num_used,
            slots.size,
            scheduler.num_running,
            0 if prefixes is None else prefixes.num_checkpoints,
        )


class _Distribution:
    """A histogram in the making."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._sum)
