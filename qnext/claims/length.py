"""C9: the cost of each kind of layer over a million tokens of context, and a prompt of a million tokens, read once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qnext.bench.contest import Contestants, Step
from qnext.claims.claim import Findings, Grid, Picture, Workplace, exactly
from qnext.claims.layers.speed import LayerSpeed
from qnext.claims.notebook import Measured, Point
from qnext.config import ModelConfig, hybrid_pattern
from qnext.diagnostics.charts import Axis, Curve, LineChart
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.eval.intervals import Interval, mean_interval
from qnext.model import CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.planning.flops import prefill_flops
from qnext.planning.machine import format_bytes, peak_bytes

NATIVE_CONTEXT = 262_144


def reader_model(*, yarn: float | None, context: int = NATIVE_CONTEXT) -> CausalLM:
    """Four layers in the proportions of the released model, small enough to read its whole context in a minute."""
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=64,
        layer_types=hybrid_pattern(4, interval=4),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        partial_rotary_factor=0.25,
        rope_theta=1e7,
        max_position_embeddings=context + 64,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = CausalLM(config if yarn is None else config.with_yarn(yarn)).to(torch.bfloat16).eval()
    initialize(model, seed=0)
    return model


def read_prompt(engine: Engine, num_tokens: int, num_new: int, edge: int) -> dict[str, Any]:
    """Read a prompt step by step and decode `num_new` tokens; `edge` tokens at both ends are timed apart."""
    prompt = [(i * 7919 + i // 97) % engine.model_config.vocab_size for i in range(num_tokens)]
    request = engine.add_request(prompt, SamplingParams(max_tokens=num_new, ignore_eos=True))
    times = [(0, time.perf_counter())]
    while not request.output_ids:
        engine.step()
        request.raise_failure()
        times.append((engine.metrics.prompt_tokens_computed, time.perf_counter()))
    started = time.perf_counter()
    while request.finish_reason is None:
        engine.step()
    request.raise_failure()
    decode_seconds = time.perf_counter() - started
    return {
        "prompt_tokens": num_tokens,
        "prefill_seconds": times[-1][1] - times[0][1],
        "first_tokens_per_second": _rate([t for t in times if t[0] <= edge] or times),
        "last_tokens_per_second": _rate([t for t in times if t[0] >= num_tokens - edge] or times),
        "prefill_tokens_per_second": _rate(times),
        "decode_tokens_per_second": (num_new - 1) / decode_seconds,
    }


def _rate(times: list[tuple[int, float]]) -> float:
    (first, started), (last, ended) = times[0], times[-1]
    return (last - first) / (ended - started) if last > first else 0.0


def read_as_planned(*, num_tokens: int, yarn: float | None, num_new: int, edge: int, context: int) -> dict[str, Any]:
    """The prompt through an engine, and the bytes that it planned beside the weights and those that it took."""
    keep_freed_memory()
    model = reader_model(yarn=yarn, context=context)
    before = peak_bytes()
    started = time.perf_counter()
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=num_tokens + num_new))
    seconds = time.perf_counter() - started
    plan = engine.memory_plan
    found = read_prompt(engine, num_tokens, num_new, edge)
    return {
        "plan": plan.describe(),
        "start_seconds": seconds,
        "cache_bytes": plan.kv_bytes + plan.state_bytes,
        "planned_bytes": plan.total_bytes - plan.weight_bytes,
        "grown_bytes": peak_bytes() - before,
        "flops": prefill_flops(model.config, num_tokens).total,
        "threads": torch.get_num_threads(),
        **found,
    }


def prompt_worker(**arguments: Any) -> Step:
    """One step: read_as_planned."""
    return lambda: read_as_planned(edge=8192, **arguments)


@dataclass(frozen=True)
class LinearCost:
    """Chunks of a prompt at several positions, and one long prompt, which `yarn` makes room for.

    `positions` are (context, tokens) of the full layer: the deeper, the fewer tokens. The linear layer is timed on
    `chunk` tokens everywhere, since its experts take longer for each of few tokens than for each of many.
    """

    layers: LayerSpeed
    positions: tuple[tuple[int, int], ...]
    chunk: int
    prompt: int
    yarn: float
    native: int = NATIVE_CONTEXT

    def points(self, at: Workplace) -> Iterable[Point]:
        linear = [(context, self.chunk) for context, _ in self.positions]
        chunks = [
            self.layers.chunk_point(at, *position, ("linear", "full"), name="cost") for position in self.positions
        ]
        chunks += [
            self.layers.chunk_point(at, *position, ("linear",), name="cost")
            for position in linear
            if position not in self.positions
        ]
        facts = {"tokens": self.prompt, "yarn": self.yarn, "native": self.native}
        return [*chunks, Point(f"prompt/{self.prompt}", facts, self._read)]

    def _read(self) -> dict[str, Any]:
        """In a process of its own, whose peak of memory is that of this prompt."""
        arguments = {"num_tokens": self.prompt, "yarn": self.yarn, "num_new": 8, "context": self.native}
        if self.layers.in_this_process:
            return prompt_worker(**arguments)()
        with Contestants({"reader": (prompt_worker, arguments)}) as worker:
            return worker.step("reader")[1]

    def findings(self, known: Mapping[str, Measured]) -> Findings:
        values: dict[str, Interval] = {}
        linear = {context: self._times(known, "linear", context, self.chunk) for context, _ in self.positions}
        full = {context: self._times(known, "full", context, tokens) for context, tokens in self.positions}
        rows = [[f"{context:,}", _microseconds(linear[context]), _microseconds(full[context])] for context in linear]
        (first, _), (last, _) = self.positions[0], self.positions[-1]
        for kind, found in (("linear", linear), ("full", full)):
            if found[first] and found[last]:
                ratios = [after / before for before, after in zip(found[first], found[last], strict=True)]
                values[f"{kind}_last_over_first"] = mean_interval(ratios)
        grids = [Grid("Microseconds of a token", ["tokens before it", "linear layer", "full layer"], rows)]
        entry = known.get(f"prompt/{self.prompt}")
        if entry is not None:
            read = entry.value
            values["prompt_tokens"] = exactly(read["prompt_tokens"])
            values["grown_over_planned"] = exactly(read["grown_bytes"] / read["planned_bytes"])
            grids.append(_prompt_grid(read))
        return Findings(_SETTING, values, grids, _pictures({"linear layer": linear, "full layer": full}))

    def _times(self, known: Mapping[str, Measured], kind: str, context: int, tokens: int) -> list[float]:
        """Microseconds of a token, round by round; none where that was not measured."""
        entry = known.get(self.layers.chunk_name(context, tokens, name="cost"))
        return [] if entry is None else [1e6 * each[kind] / tokens for each in entry.value]


def _pictures(found: Mapping[str, Mapping[int, list[float]]]) -> list[Picture]:
    curves = [
        Curve(name, [c for c in times if times[c]], [mean_interval(times[c]).value for c in times if times[c]])
        for name, times in found.items()
    ]
    axes = Axis("tokens before it", is_log=True), Axis("microseconds of a token", is_log=True)
    title = "What a token costs in a layer"
    return [Picture("cost", title, [LineChart(title, *axes, curves)])] if all(curve.x for curve in curves) else []


def _prompt_grid(read: Mapping[str, Any]) -> Grid:
    rows = [
        ["tokens of the prompt", f"{read['prompt_tokens']:,}"],
        ["operations, as planned", f"{read['flops']:.2e}"],
        ["seconds", f"{read['prefill_seconds']:,.1f}"],
        ["tokens/s: first 8,192, last 8,192", "{:,.0f}, {:,.0f}".format(*_ends(read))],
        ["tokens/s behind it", f"{read['decode_tokens_per_second']:,.1f}"],
        ["planned beside the weights", format_bytes(read["planned_bytes"])],
        ["the process grew by", format_bytes(read["grown_bytes"])],
    ]
    return Grid("One prompt, by YaRN, through an engine", ["", ""], rows)


def _ends(read: Mapping[str, Any]) -> tuple[float, float]:
    return read["first_tokens_per_second"], read["last_tokens_per_second"]


def _microseconds(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{mean_interval(values).value:,.1f} ({min(values):,.1f} to {max(values):,.1f})"


_SETTING = (
    "One linear and one full layer in the released shape, with their 512 experts, chunks of a prompt behind so many "
    "tokens of a filled cache (range of the rounds in brackets). Then a prompt of over a million tokens, through an "
    "engine, by a model of four layers with one attention head of 32 dims, whose context YaRN stretches four times."
)
