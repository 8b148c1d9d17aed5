"""Prometheus text of an engine and of the server around it. No torch. Its counts end with the objects that own them.

Legend: E experts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qnext.planning.expert_shape import expert_shape

if TYPE_CHECKING:
    from qnext.engine.execution.expert_load import ExpertLoad
    from qnext.engine.execution.expert_reads import ExpertReads
    from qnext.engine.metrics import EngineMetrics, Histogram
    from qnext.server.expert_watch import ExpertWatch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RECENT_STEPS = 64  # as many as an engine remembers
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"
_MAX_SERIES = 1024
_COMPILE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

Labels = dict[str, str]


class MetricsSource(Protocol):
    """The part of an Engine that metrics read."""

    @property
    def metrics(self) -> EngineMetrics: ...

    def expert_load(self, num_steps: int = 1) -> ExpertLoad | None: ...


class ServerCounters:
    """What the server itself counts. Only the event loop touches it.

    Labels have few values, whatever clients send. Routes are patterns. Unknown methods are "other". After 1,024
    combinations every new combination is "other" too.
    """

    def __init__(self) -> None:
        self.is_ready = False
        self.open_streams = 0
        self.auth_failures = 0
        self.audit_lines_lost = 0
        self.requests = _Series(3)  # by route, method, status
        self.aborts = _Series(1)  # by phase
        self.rejections = _Series(1)  # by reason
        self.grammar_compile = _Observations(_COMPILE_SECONDS)
        self.event_loop_lag = _Observations(_LAG_SECONDS)
        self.moderation: dict[str, _Observations] = {}  # by stage, once a text was judged
        self.verdicts = _Series(2)  # by stage, action
        self.moderation_failures = _Series(2)  # by stage, reason

    def count_request(self, route: str | None, method: str, status: int) -> None:
        """`route` is the pattern of a route, such as "/v1/models/{id}"; None where no route was found."""
        known = method if method in KNOWN_METHODS else _OTHER
        self.requests.add("unmatched" if route is None else route, known, str(status))

    def count_abort(self, phase: str) -> None:
        """A request whose client went away, in the queue or while something was computed for it."""
        self.aborts.add(phase)

    def count_rejection(self, reason: str) -> None:
        self.rejections.add(reason)

    def count_auth_failure(self) -> None:
        self.auth_failures += 1

    def observe_grammar_compile(self, seconds: float) -> None:
        self.grammar_compile.observe(seconds)

    def observe_moderation(self, stage: str, action: str | None, seconds: float) -> None:
        """`action` None: there was no verdict."""
        self.moderation.setdefault(stage, _Observations(_COMPILE_SECONDS)).observe(seconds)
        if action is not None:
            self.verdicts.add(stage, action)

    def count_moderation_failure(self, stage: str, reason: str) -> None:
        self.moderation_failures.add(stage, reason)

    def observe_event_loop_lag(self, seconds: float) -> None:
        self.event_loop_lag.observe(seconds)


class ServerMetrics:
    """Renders the metrics of engine and server. `source` is the engine, or None until it is loaded. `block_size` is the
    number of tokens in a block.

    `num_waiting` returns how many requests wait in the server's own queue, before that of the engine.
    """

    def __init__(
        self,
        counters: ServerCounters,
        *,
        model_name: str,
        block_size: int,
        source: MetricsSource | None = None,
        num_waiting: Callable[[], int] | None = None,
        watch: ExpertWatch | None = None,
    ) -> None:
        self.counters = counters
        self.model_name = model_name
        self.block_size = block_size
        self.source = source
        self.num_waiting = num_waiting
        self.watch = watch

    def render(self, compat: Literal["vllm"] | None = None) -> bytes:
        """Text of format 0.0.4, to be sent as CONTENT_TYPE. `compat` adds the names that vLLM's dashboards read."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(self._families(compat)))
        return generate_latest(registry)

    def _families(self, compat: str | None) -> Iterator[Metric]:
        yield from _server_families(self.counters)
        if self.source is None:
            return
        metrics, labels = self.source.metrics, {"model_name": self.model_name}
        if self.num_waiting is not None:
            metrics = replace(metrics, gauges=replace(metrics.gauges, num_waiting=self.num_waiting()))
        yield from _engine_families(metrics, labels, self.block_size)
        if compat == "vllm":
            yield from _vllm_families(metrics, labels, self.block_size)
        if metrics.experts is not None:
            yield from _read_families(metrics.experts, labels)
        load = self.source.expert_load(RECENT_STEPS)
        if load is not None:
            yield from _expert_families(load, labels)
        if self.watch is not None:
            yield from self.watch.families(labels)


class _Families(Collector):
    """One rendering's families."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Series:
    """Counts by the values of labels, of a bounded number of combinations."""

    def __init__(self, num_labels: int) -> None:
        self._others = (_OTHER,) * num_labels
        self.counts: Counter[tuple[str, ...]] = Counter()

    def add(self, *values: str) -> None:
        assert len(values) == len(self._others)
        is_known = values in self.counts or len(self.counts) < _MAX_SERIES
        self.counts[values if is_known else self._others] += 1


class _Observations:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


# ---- families ----


def _gauge(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counter(name: str, text: str, value: float, labels: Labels) -> Metric:
    family = CounterMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counters(
    name: str, text: str, names: Sequence[str], counts: Mapping[tuple[str, ...], float], labels: Labels
) -> Metric:
    """One series for each combination of the values of `names`, all with `labels`."""
    family = CounterMetricFamily(name, text, labels=(*labels, *names))
    for values, count in counts.items():
        family.add_metric((*labels.values(), *values), count)
    return family


def _histogram(name: str, text: str, values: Histogram | _Observations, labels: Labels) -> Metric:
    family = HistogramMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), _buckets(values), values.sum)
    return family


def _buckets(values: Histogram | _Observations) -> list[tuple[str, int]]:
    total, buckets = 0, []
    for bound, count in zip((*values.bounds, math.inf), values.counts, strict=True):
        total += count
        buckets.append(("+Inf" if math.isinf(bound) else str(float(bound)), total))
    return buckets


def _moderation_families(counters: ServerCounters) -> Iterator[Metric]:
    """Of a server that judges texts."""
    text = "Time of the operator's moderation, by what is judged"
    family = HistogramMetricFamily("qnext_moderation_seconds", text, labels=("stage",))
    for stage, values in counters.moderation.items():
        family.add_metric((stage,), _buckets(values), values.sum)
    yield family
    text = "Texts judged by the operator's moderation"
    yield _counters("qnext_moderation_verdicts", text, ("stage", "action"), counters.verdicts.counts, {})
    text = "Texts that it could not judge"
    failures = counters.moderation_failures.counts
    yield _counters("qnext_moderation_failures", text, ("stage", "reason"), failures, {})


def _server_families(counters: ServerCounters) -> Iterator[Metric]:
    requests = ("route", "method", "status")
    yield _counters(
        "qnext_http_requests", "Answers, by route, method and status", requests, counters.requests.counts, {}
    )
    text = "Requests whose client went away, by what was being done"
    yield _counters("qnext_request_aborted", text, ("phase",), counters.aborts.counts, {})
    yield _counters("qnext_rejected", "Requests refused, by reason", ("reason",), counters.rejections.counts, {})
    yield _counter("qnext_auth_failures", "Requests without a valid key", counters.auth_failures, {})
    text = "Lines that the audit log could not keep"
    yield _counter("qnext_audit_lines_lost", text, counters.audit_lines_lost, {})
    text = "Time to compile the grammar of a constraint"
    yield _histogram("qnext_grammar_compile_seconds", text, counters.grammar_compile, {})
    text = "How late the event loop came to a timer"
    yield _histogram("qnext_event_loop_lag_seconds", text, counters.event_loop_lag, {})
    if counters.moderation:
        yield from _moderation_families(counters)
    yield _gauge("qnext_open_streams", "Streams of answers that are open", counters.open_streams, {})
    yield _gauge("qnext_ready", "1 when requests are taken", float(counters.is_ready), {})


def _engine_families(metrics: EngineMetrics, labels: Labels, block_size: int) -> Iterator[Metric]:
    gauges, prefix = metrics.gauges, metrics.prefix
    for name, text, value in (
        ("num_requests_running", "Requests in the running batch", gauges.num_running),
        ("num_requests_waiting", "Requests that wait for their first step", gauges.num_waiting),
        ("kv_cache_usage_ratio", "Share of KV blocks in use, cached prefixes included", _usage(metrics)),
        ("kv_blocks_in_use", "KV blocks of requests and of cached prefixes", gauges.num_blocks_used),
        ("kv_blocks_cached", "KV blocks of cached prefixes, alone or with requests", gauges.num_blocks_cached),
        ("kv_blocks", "KV blocks", gauges.num_blocks),
        ("state_slots_in_use", "Recurrent states of requests and of cached prefixes", gauges.num_slots_used),
        ("state_slots_running", "Recurrent states of running requests", gauges.num_slots_running),
        ("state_slots_cached", "Recurrent states of cached prefixes", gauges.num_slots_cached),
        ("state_slots", "Slots for recurrent states", gauges.num_slots),
    ):
        yield _gauge(f"qnext_{name}", text, value, labels)
    for name, text, count in (
        ("requests", "Requests that were queued", metrics.num_requests),
        ("steps", "Steps of the engine", metrics.num_steps),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", prefix.tokens_looked_up),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache", prefix.tokens_hit),
        ("prefix_checkpoints_evicted", "States of cached prefixes that had to go", prefix.num_checkpoints_evicted),
        ("prefix_blocks_evicted", "KV blocks of cached prefixes that had to go", prefix.num_blocks_evicted),
        ("prompt_tokens", "Prompt tokens, computed and cached", _prompt_tokens(metrics)),
        ("prompt_tokens_cached", "Prompt tokens that were cached", metrics.prompt_tokens_cached),
        ("generation_tokens", "Tokens of answers", metrics.output_tokens),
        ("draft_tokens", "Drafted tokens that were verified", metrics.drafted_tokens),
        ("accepted_tokens", "Drafted tokens that answers got", metrics.accepted_tokens),
        ("preemptions", "Requests that had to make room", metrics.num_preemptions),
    ):
        yield _counter(f"qnext_{name}", text, count, labels)
    finished: dict[tuple[str, ...], float] = {(reason,): count for reason, count in asdict(metrics.finished).items()}
    yield _counters("qnext_request_success", "Requests that ended", ("finished_reason",), finished, labels)
    yield from _distributions("qnext_", metrics, labels)
    sizes = {"block_size": str(block_size), "num_blocks": str(gauges.num_blocks)}
    yield _gauge("qnext_cache_config_info", "Size of the KV cache", 1, labels | sizes)


def _vllm_families(metrics: EngineMetrics, labels: Labels, block_size: int) -> Iterator[Metric]:
    """The names of vLLM 0.10 and later, https://docs.vllm.ai/en/stable/usage/metrics/."""
    gauges = metrics.gauges
    for name, text, value in (
        ("num_requests_running", "Requests in the running batch", gauges.num_running),
        ("num_requests_waiting", "Requests that wait for their first step", gauges.num_waiting),
        ("kv_cache_usage_perc", "Share of KV blocks in use, 1 is all", _usage(metrics)),
    ):
        yield _gauge(f"vllm:{name}", text, value, labels)
    for name, text, count in (
        ("prefix_cache_queries", "Tokens looked up in the prefix cache", metrics.prefix.tokens_looked_up),
        ("prefix_cache_hits", "Tokens found in the prefix cache", metrics.prefix.tokens_hit),
        ("prompt_tokens", "Prompt tokens", _prompt_tokens(metrics)),
        ("generation_tokens", "Tokens of answers", metrics.output_tokens),
        ("num_preemptions", "Requests that had to make room", metrics.num_preemptions),
        ("spec_decode_num_draft_tokens", "Drafted tokens", metrics.drafted_tokens),
        ("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted", metrics.accepted_tokens),
    ):
        yield _counter(f"vllm:{name}", text, count, labels)
    finished = asdict(metrics.finished)
    finished["abort"] += finished.pop("deadline")  # which vLLM's boards do not know
    reasons: dict[tuple[str, ...], float] = {(reason,): count for reason, count in finished.items()}
    yield _counters("vllm:request_success", "Requests that ended", ("finished_reason",), reasons, labels)
    yield from _distributions("vllm:", metrics, labels)
    sizes = {"block_size": str(block_size), "num_gpu_blocks": str(gauges.num_blocks)}
    yield _gauge("vllm:cache_config_info", "Size of the KV cache", 1, labels | sizes)


def _distributions(prefix: str, metrics: EngineMetrics, labels: Labels) -> Iterator[Metric]:
    for name, text, values in (
        ("time_to_first_token_seconds", "From arrival to the first token", metrics.time_to_first_token),
        ("inter_token_latency_seconds", "Between two tokens of a request", metrics.inter_token_latency),
        ("e2e_request_latency_seconds", "From arrival to the end", metrics.end_to_end_time),
        ("request_queue_time_seconds", "From arrival to the first step", metrics.queue_time),
        ("iteration_tokens_total", "Tokens of a step", metrics.step_tokens),
    ):
        yield _histogram(prefix + name, text, values, labels)


def _expert_families(load: ExpertLoad, labels: Labels) -> Iterator[Metric]:
    """Few numbers per layer: one series for each expert would be 24,576 of the released model."""
    names = (*labels, "layer", "window")
    balance = GaugeMetricFamily("qnext_expert_balancedness", "Mean load of experts over the largest", labels=names)
    entropy = GaugeMetricFamily("qnext_expert_entropy_ratio", "Entropy of the load, 1 is balanced", labels=names)
    top = GaugeMetricFamily("qnext_expert_top_share_ratio", "Share of the busiest 1 % of experts", labels=names)
    dead = GaugeMetricFamily("qnext_experts_dead", "Experts without any token", labels=names)
    for layer in load.layers:
        # Since the engine was made, and of the last RECENT_STEPS.
        for window, tokens in (("start", layer.tokens), ("recent", layer.recent)):
            shape = expert_shape(np.array([tokens]))
            values = (*labels.values(), str(layer.layer_index), window)
            balance.add_metric(values, shape.balance_L[0])
            entropy.add_metric(values, shape.entropy_L[0])
            top.add_metric(values, shape.top_share_L[0])
            dead.add_metric(values, shape.num_dead_L[0])
    yield from (balance, entropy, top, dead)


def _read_families(reads: ExpertReads, labels: Labels) -> Iterator[Metric]:
    """Of a model with experts on disk, or on the host of a GPU."""
    for name, text, few, sweep in (
        ("hits", "Experts that steps found in memory", reads.hits, reads.sweep_hits),
        ("misses", "Experts that steps had to wait for", reads.misses, reads.sweep_misses),
        ("wait_seconds", "Time that steps waited for experts", reads.seconds_waited, reads.sweep_seconds_waited),
    ):
        if few is None or sweep is None:
            continue
        # A sweep needs half of a layer or more, as a long prompt does.
        yield _counters(f"qnext_expert_{name}", text, ("kind",), {("few",): few, ("sweep",): sweep}, labels)
    text = "Bytes of experts read from disk, or copied to a GPU"
    yield _counter("qnext_expert_read_bytes", text, reads.bytes_read, labels)
    text = "Share of the experts that memory is kept for"
    yield _gauge("qnext_expert_resident_ratio", text, reads.resident_ratio, labels)
    text = "Memory for experts from disk, or of a GPU for those of its host"
    yield _gauge("qnext_expert_memory_bytes", text, reads.memory_bytes, labels)


def _usage(metrics: EngineMetrics) -> float:
    return metrics.gauges.num_blocks_used / metrics.gauges.num_blocks if metrics.gauges.num_blocks else 0.0


def _prompt_tokens(metrics: EngineMetrics) -> int:
    return metrics.prompt_tokens_computed + metrics.prompt_tokens_cached
