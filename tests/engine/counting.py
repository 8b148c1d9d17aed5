"""Engines of which a test counts itself what the metrics are to say."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from qnext.engine import Engine, EngineConfig, EngineMetrics, SamplingParams
from qnext.engine.policy.step import StepPlan
from qnext.model import CausalLM
from tests.engine.executors import Wrapped, local

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)
COUNTERS = (
    "num_requests",
    "num_steps",
    "prompt_tokens_computed",
    "prompt_tokens_cached",
    "output_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "num_preemptions",
)
HISTOGRAMS = ("step_tokens", "queue_time", "time_to_first_token", "inter_token_latency", "end_to_end_time")


class CountingExecutor(Wrapped):
    """Counts the tokens of the plans, and keeps the logits of every chosen token."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.num_tokens = 0
        self.rows: list[Tensor] = []

    def execute(self, plan: StepPlan):  # type: ignore[no-untyped-def]
        self.num_tokens += sum(len(sequence.token_ids) for sequence in plan.sequences)
        output = super().execute(plan)
        self.rows.append(output.logits_RY.clone())
        return output


def make_engine(model: CausalLM, **options: Any) -> tuple[Engine, CountingExecutor]:
    engine = Engine.of(model, EngineConfig(poison=True, **options))
    executor = CountingExecutor(engine)
    return engine, executor


def check(metrics: EngineMetrics) -> None:
    """What holds at every moment."""
    gauges = metrics.gauges
    assert metrics.num_requests == sum(asdict(metrics.finished).values()) + gauges.num_running + gauges.num_waiting
    assert metrics.step_tokens.count == metrics.num_steps
    assert metrics.time_to_first_token.count + metrics.inter_token_latency.count == metrics.output_tokens
    assert metrics.accepted_tokens <= metrics.drafted_tokens
    assert gauges.num_slots_running + gauges.num_slots_cached <= gauges.num_slots_used <= gauges.num_slots
    assert gauges.num_blocks_cached <= gauges.num_blocks_used <= gauges.num_blocks


def check_grown(before: EngineMetrics, after: EngineMetrics) -> None:
    old, new = before.as_dict(), after.as_dict()
    for name in COUNTERS:
        assert old[name] <= new[name]
    for name in HISTOGRAMS:
        assert old[name]["sum"] <= new[name]["sum"]
        assert all(a <= b for a, b in zip(old[name]["counts"], new[name]["counts"], strict=True))
    for part in ("finished", "prefix"):
        assert all(count <= new[part][name] for name, count in old[part].items())


def check_load(engine: Engine, num_tokens: int) -> None:
    """Each token that was computed went to top-k experts of every sparse layer."""
    config = local(engine).model.config
    load = engine.expert_load(10**6)
    assert load is not None
    assert [layer.layer_index for layer in load.layers] == [
        n for n in range(config.num_hidden_layers) if config.is_moe_layer(n)
    ]
    assert {sum(layer.tokens) for layer in load.layers} == {config.num_experts_per_tok * num_tokens}
