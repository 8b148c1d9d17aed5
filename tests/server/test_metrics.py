"""The text that Prometheus reads: parsed again, every number is the engine's or the server's."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.execution.expert_load import ExpertLoad, LayerLoad
from qnext.engine.execution.expert_reads import ExpertReads
from qnext.engine.metrics import EngineMetrics, FinishCounts, Gauges, Histogram
from qnext.engine.policy.prefix import PrefixStatistics
from qnext.server.metrics import CONTENT_TYPE, ServerCounters, ServerMetrics
from tests.engine.models import random_prompt, tiny_model

MODEL = {"model_name": "tiny"}
HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token",
    "inter_token_latency_seconds": "inter_token_latency",
    "e2e_request_latency_seconds": "end_to_end_time",
    "request_queue_time_seconds": "queue_time",
    "iteration_tokens_total": "step_tokens",
}


class Source:
    """An engine of whom only the numbers are left."""

    def __init__(self, metrics: EngineMetrics, load: ExpertLoad | None = None) -> None:
        self.metrics = metrics
        self.load = load

    def expert_load(self, num_steps: int = 1) -> ExpertLoad | None:
        return self.load


def parse(text: bytes) -> tuple[dict[str, str], dict[tuple[str, frozenset[tuple[str, str]]], float]]:
    """Types by family, and samples by name and labels; no sample comes twice."""
    types, samples = {}, {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.name not in types and family.documentation
        types[family.name] = family.type
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return types, samples


class Page:
    def __init__(self, text: bytes) -> None:
        self.types, self.samples = parse(text)

    def value(self, name: str, **labels: str) -> float:
        return self.samples[(name, frozenset(labels.items()))]

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def made_up(*, streams: bool = False) -> EngineMetrics:
    """Every number another one, so that none can stand for its neighbour."""
    numbers = iter(range(1001, 9999, 7))

    def histogram(*bounds: float) -> Histogram:
        return Histogram(bounds, tuple(next(numbers) for _ in range(len(bounds) + 1)), float(next(numbers)))

    return EngineMetrics(
        *(next(numbers) for _ in range(1)),
        FinishCounts(*(next(numbers) for _ in range(5))),
        *(next(numbers) for _ in range(7)),
        histogram(1.0, 2.0, 4.0),
        histogram(0.001, 5.0),
        histogram(0.25),
        histogram(0.5, 1.0),
        histogram(3.0),
        Gauges(*(next(numbers) for _ in range(9))),
        PrefixStatistics(*(next(numbers) for _ in range(7))),
        ExpertReads(*(next(numbers) for _ in range(10))) if streams else None,
    )


def render(source: Any, compat: Any = None, counters: ServerCounters | None = None, **options: Any) -> Page:
    made = ServerMetrics(counters or ServerCounters(), model_name="tiny", block_size=16, source=source, **options)
    return Page(made.render(compat))


def check_histogram(page: Page, name: str, values: Histogram, **labels: str) -> None:
    assert page.types[name] == "histogram"
    total = 0
    for bound, count in zip((*values.bounds, math.inf), values.counts, strict=True):
        total += count
        le = "+Inf" if math.isinf(bound) else str(bound)
        assert page.value(f"{name}_bucket", le=le, **labels) == total
    assert page.value(f"{name}_count", **labels) == total == values.count
    assert page.value(f"{name}_sum", **labels) == values.sum


def test_every_number_has_its_name() -> None:
    m = made_up()
    g, p = m.gauges, m.prefix
    page = render(Source(m))
    for name, value in {
        "num_requests_running": g.num_running,
        "num_requests_waiting": g.num_waiting,
        "kv_cache_usage_ratio": g.num_blocks_used / g.num_blocks,
        "kv_blocks_in_use": g.num_blocks_used,
        "kv_blocks_cached": g.num_blocks_cached,
        "kv_blocks": g.num_blocks,
        "state_slots_in_use": g.num_slots_used,
        "state_slots": g.num_slots,
        "state_slots_running": g.num_slots_running,
        "state_slots_cached": g.num_slots_cached,
    }.items():
        assert page.types[f"qnext_{name}"] == "gauge" and page.value(f"qnext_{name}", **MODEL) == value
    for name, value in {
        "requests": m.num_requests,
        "steps": m.num_steps,
        "prefix_cache_queries": p.tokens_looked_up,
        "prefix_cache_hits": p.tokens_hit,
        "prompt_tokens": m.prompt_tokens_computed + m.prompt_tokens_cached,
        "prompt_tokens_cached": m.prompt_tokens_cached,
        "generation_tokens": m.output_tokens,
        "draft_tokens": m.drafted_tokens,
        "accepted_tokens": m.accepted_tokens,
        "preemptions": m.num_preemptions,
        "prefix_checkpoints_evicted": p.num_checkpoints_evicted,
        "prefix_blocks_evicted": p.num_blocks_evicted,
    }.items():
        assert page.types[f"qnext_{name}"] == "counter" and page.value(f"qnext_{name}_total", **MODEL) == value
    for reason in ("stop", "length", "abort", "error", "deadline"):
        value = getattr(m.finished, reason)
        assert page.value("qnext_request_success_total", finished_reason=reason, **MODEL) == value
    for name, field in HISTOGRAMS.items():
        check_histogram(page, f"qnext_{name}", getattr(m, field), **MODEL)
    assert page.value("qnext_cache_config_info", block_size="16", num_blocks=str(g.num_blocks), **MODEL) == 1
    assert not any(name.startswith("vllm") or name.endswith("_created") for name in page.names())


def test_the_names_of_vllm() -> None:
    """As its documentation lists them: https://docs.vllm.ai/en/stable/usage/metrics/"""
    m = made_up()
    g = m.gauges
    page = render(Source(m), "vllm")
    for name, value in {
        "num_requests_running": g.num_running,
        "num_requests_waiting": g.num_waiting,
        "kv_cache_usage_perc": g.num_blocks_used / g.num_blocks,
        "prefix_cache_queries_total": m.prefix.tokens_looked_up,
        "prefix_cache_hits_total": m.prefix.tokens_hit,
        "num_preemptions_total": m.num_preemptions,
        "prompt_tokens_total": m.prompt_tokens_computed + m.prompt_tokens_cached,
        "generation_tokens_total": m.output_tokens,
        "spec_decode_num_draft_tokens_total": m.drafted_tokens,
        "spec_decode_num_accepted_tokens_total": m.accepted_tokens,
    }.items():
        assert page.value(f"vllm:{name}", **MODEL) == value
        assert page.types[f"vllm:{name.removesuffix('_total')}"] == ("counter" if name.endswith("_total") else "gauge")
    f = m.finished
    for reason, value in {"stop": f.stop, "length": f.length, "abort": f.abort + f.deadline, "error": f.error}.items():
        assert page.value("vllm:request_success_total", finished_reason=reason, **MODEL) == value
    for name, field in HISTOGRAMS.items():
        check_histogram(page, f"vllm:{name}", getattr(m, field), **MODEL)
    assert page.value("vllm:cache_config_info", block_size="16", num_gpu_blocks=str(g.num_blocks), **MODEL) == 1
    own = {key: value for key, value in page.samples.items() if not key[0].startswith("vllm:")}
    assert own == render(Source(m)).samples  # and the own names all the same


def test_a_real_engine() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=3, max_model_len=256))
    metrics = ServerMetrics(ServerCounters(), model_name="tiny", block_size=16, source=engine)
    shared = random_prompt(128, seed=1)
    before: dict[Any, float] = {}
    for round_ in range(3):
        for extra in range(4):
            engine.add_request([*shared, *random_prompt(5 + extra, seed=round_)], SamplingParams(max_tokens=5 + extra))
        while engine.has_unfinished:
            engine.step()
            page = Page(metrics.render("vllm"))
            m = engine.metrics
            assert page.value("qnext_generation_tokens_total", **MODEL) == m.output_tokens
            assert page.value("vllm:num_requests_running", **MODEL) == m.gauges.num_running
            falling = [
                key
                for key, value in before.items()
                if key[0].endswith(("_total", "_bucket", "_count", "_sum")) and page.samples[key] < value
            ]
            assert not falling
            before = page.samples
    assert page.value("qnext_prefix_cache_hits_total", **MODEL) == m.prefix.tokens_hit > 0
    assert page.value("qnext_prompt_tokens_total", **MODEL) == m.prompt_tokens_computed + m.prompt_tokens_cached
    for name, field in HISTOGRAMS.items():
        check_histogram(page, f"qnext_{name}", getattr(m, field), **MODEL)
    ended = sum(value for (name, _), value in page.samples.items() if name == "qnext_request_success_total")
    assert ended == m.num_requests == 12
    load = engine.expert_load(64)
    assert load is not None
    for layer in load.layers:
        where = {"layer": str(layer.layer_index), **MODEL}
        assert page.value("qnext_experts_dead", window="start", **where) == layer.num_dead
        entropy = page.value("qnext_expert_entropy_ratio", window="start", **where)
        assert entropy == pytest.approx(layer.entropy, abs=1e-12)
        top = max(layer.tokens) / sum(layer.tokens)
        assert page.value("qnext_expert_top_share_ratio", window="start", **where) == pytest.approx(top)
        mean = sum(layer.recent) / len(layer.recent) / max(layer.recent)
        assert page.value("qnext_expert_balancedness", window="recent", **where) == pytest.approx(mean)


def test_an_engine_without_experts_or_blocks() -> None:
    for kind in ("dense", "linear"):
        engine = Engine.of(tiny_model(kind), EngineConfig(max_num_seqs=2, max_model_len=64, count_experts=False))
        engine.add_request(random_prompt(5, seed=1), SamplingParams(max_tokens=2))
        while engine.has_unfinished:
            engine.step()
        page = render(engine, "vllm")
        assert not any("expert" in name for name in page.names())
        assert 0 <= page.value("vllm:kv_cache_usage_perc", **MODEL) <= 1
        assert page.value("qnext_requests_total", **MODEL) == 1


def test_experts_whose_numbers_are_known() -> None:
    tokens = (50, 30, *([1] * 120), *([0] * 28))  # 150 experts, of which two are the busiest 1 %
    layers = (
        LayerLoad(3, tokens, (4, 0, 4, 0), 0.0, 28),
        LayerLoad(7, (0, 0), (0, 0), 1.0, 2),
        LayerLoad(9, (5,), (5,), 1, 0),
    )
    page = render(Source(made_up(), ExpertLoad(9, 5, layers)))

    def values(layer: int, window: str) -> list[float]:
        labels = {"layer": str(layer), "window": window, **MODEL}
        names = ("expert_balancedness", "expert_entropy_ratio", "expert_top_share_ratio", "experts_dead")
        return [page.value(f"qnext_{name}", **labels) for name in names]

    shares = [n / 200 for n in tokens if n]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(150)
    assert values(3, "start") == pytest.approx([200 / 150 / 50, entropy, 80 / 200, 28])
    assert values(3, "recent") == pytest.approx([0.5, 0.5, 0.5, 2])
    assert values(7, "start") == [1.0, 1.0, 0.5, 2]  # no token yet
    assert values(9, "start") == [1.0, 1.0, 1.0, 0]
    assert sum("expert" in name for name, _ in page.samples) == 3 * 2 * 4


def test_experts_from_disk() -> None:
    metrics = made_up(streams=True)
    reads = metrics.experts
    assert reads is not None
    page = render(Source(metrics))
    for name, few, sweep in (
        ("hits", reads.hits, reads.sweep_hits),
        ("misses", reads.misses, reads.sweep_misses),
        ("wait_seconds", reads.seconds_waited, reads.sweep_seconds_waited),
    ):
        assert page.types[f"qnext_expert_{name}"] == "counter"
        for kind, value in (("few", few), ("sweep", sweep)):
            assert page.value(f"qnext_expert_{name}_total", kind=kind, **MODEL) == value
    assert page.value("qnext_expert_read_bytes_total", **MODEL) == reads.bytes_read
    assert page.value("qnext_expert_resident_ratio", **MODEL) == reads.num_resident / reads.num_experts
    assert page.value("qnext_expert_memory_bytes", **MODEL) == reads.memory_bytes
    assert not any("expert" in name for name in render(Source(made_up())).names())
    on_gpu = replace(metrics, experts=replace(reads, seconds_waited=None, sweep_seconds_waited=None))
    assert page.names() - render(Source(on_gpu)).names() == {"qnext_expert_wait_seconds_total"}


def test_the_queue_before_the_engine_counts() -> None:
    page = render(Source(made_up()), "vllm", num_waiting=lambda: 5)
    assert page.value("qnext_num_requests_waiting", **MODEL) == page.value("vllm:num_requests_waiting", **MODEL) == 5
    assert page.value("qnext_num_requests_running", **MODEL) == made_up().gauges.num_running


def test_what_the_server_counts() -> None:
    counters = ServerCounters()
    for route, method, status in (
        ("/v1/models/{id}", "GET", 200),
        ("/v1/models/{id}", "GET", 200),
        (None, "POST", 404),
    ):
        counters.count_request(route, method, status)
    counters.count_abort("queue")
    counters.count_abort("decode")
    counters.count_abort("decode")
    counters.count_rejection("rate_limit")
    for _ in range(4):
        counters.count_auth_failure()
    for seconds in (0.001, 0.0011, 0.3, 60.0):
        counters.observe_grammar_compile(seconds)
    counters.observe_event_loop_lag(0.02)
    counters.open_streams = 3
    page = render(None, "vllm", counters)
    total = "qnext_http_requests_total"
    assert page.value(total, route="/v1/models/{id}", method="GET", status="200") == 2
    assert page.value(total, route="unmatched", method="POST", status="404") == 1
    assert page.value("qnext_request_aborted_total", phase="decode") == 2
    assert page.value("qnext_request_aborted_total", phase="queue") == 1
    assert page.value("qnext_rejected_total", reason="rate_limit") == 1
    assert page.value("qnext_auth_failures_total") == 4
    compile_ = "qnext_grammar_compile_seconds"
    assert page.value(f"{compile_}_bucket", le="0.001") == 1 and page.value(f"{compile_}_bucket", le="0.0025") == 2
    assert page.value(f"{compile_}_bucket", le="0.5") == page.value(f"{compile_}_bucket", le="5.0") == 3
    assert page.value(f"{compile_}_count") == 4 and page.value(f"{compile_}_sum") == pytest.approx(60.3021)
    assert page.value("qnext_event_loop_lag_seconds_count") == 1
    assert (page.value("qnext_open_streams"), page.value("qnext_ready")) == (3, 0)
    counters.is_ready = True
    assert render(None, None, counters).value("qnext_ready") == 1
    assert all(name.startswith("qnext_") for name in page.names())  # nothing of an engine that is not there


def test_labels_are_few_whatever_clients_send() -> None:
    counters = ServerCounters()
    for number in range(5000):
        counters.count_request("/v1/models", f"METHOD{number}", 405)
        counters.count_request(f"/{number}", "GET", 404)  # that no caller should do
        counters.count_abort(f"phase {number}")
    page = render(None, None, counters)
    counts: dict[str, float] = defaultdict(float)
    for (name, _), value in page.samples.items():
        counts[name] += value
    assert sum(name == "qnext_http_requests_total" for name, _ in page.samples) <= 1025
    assert counts["qnext_http_requests_total"] == 10_000 and counts["qnext_request_aborted_total"] == 5000
    assert page.value("qnext_http_requests_total", route="/v1/models", method="other", status="405") == 5000


def test_two_servers_share_nothing() -> None:
    first, second = ServerCounters(), ServerCounters()
    first.count_auth_failure()
    assert render(None, None, first).value("qnext_auth_failures_total") == 1
    assert render(None, None, second).value("qnext_auth_failures_total") == 0
    from prometheus_client import REGISTRY, generate_latest

    assert b"qnext" not in generate_latest(REGISTRY)


def test_a_name_with_any_character_stays_one_label() -> None:
    name = 'a"b\\c\nd{e="f"} 1'
    text = ServerMetrics(ServerCounters(), model_name=name, block_size=16, source=Source(made_up())).render()
    assert Page(text).value("qnext_steps_total", model_name=name) == made_up().num_steps
    assert text.endswith(b"\n") and CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    same = ServerMetrics(ServerCounters(), model_name=name, block_size=16, source=Source(replace(made_up())))
    assert same.render() == text
