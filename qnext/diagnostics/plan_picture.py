"""`qnext plan --picture`: memory by part, and speed by context, of one model or several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qnext.diagnostics.charts import Axis, BarChart, Curve, LineChart, write_charts
from qnext.diagnostics.plan import ModelPlan
from qnext.planning.forecast import bounds, forecast

_SHORTEST = 512  # tokens


def write_plan_picture(path: Path, plans: Sequence[ModelPlan]) -> None:
    """Raises UsageError for a name that is no picture's."""
    names = ", ".join(plan.model.name for plan in plans)
    write_charts(path, [_memory(plans), _speed(plans)], title=f"plan: {names}")


def _memory(plans: Sequence[ModelPlan]) -> BarChart:
    parts = [_parts(plan) for plan in plans]
    stacks = [(name, [each[name] / 2**30 for each in parts]) for name in parts[0]]
    first = plans[0].on
    title = f"memory, {first.batch} x {first.context:,} tokens"
    return BarChart(title, Axis("GiB"), [plan.model.name for plan in plans], [each for each in stacks if any(each[1])])


def _parts(plan: ModelPlan) -> dict[str, float]:
    """Bytes in memory; of experts those that are not on disk."""
    sizes, found = plan.model.part_bytes, plan.forecast
    mixers = sizes["attention"] + sizes["delta_net"]
    tables = sizes["embedding"] + sizes["head"]
    experts = sizes["experts"] - found.disk_bytes
    others = found.weight_bytes - found.disk_bytes - mixers - tables - experts
    return {
        "experts": experts,
        "attention and delta net": mixers,
        "embedding and head": tables,
        "other weights": max(0, others),
        "keys and values": found.kv_bytes,
        "states": found.state_bytes,
        "steps": found.step_bytes,
    }


def _speed(plans: Sequence[ModelPlan]) -> LineChart:
    curves = [curve for plan in plans for curve in _curves(plan)]
    batch = plans[0].on.batch
    title = "decoding" if batch == 1 else f"decoding of {batch} sequences together"
    return LineChart(title, Axis("context, tokens", is_log=True), Axis("tokens/s"), curves)


def _curves(plan: ModelPlan) -> Iterator[Curve]:
    """Expected, and where the peaks are known what they allow. Contexts that do not fit are left out."""
    config = plan.model.config
    expected: list[tuple[int, float]] = []
    at_most: list[tuple[int, float]] = []
    for context in _contexts(config.context_length):
        on = plan.on._replace(context=context)
        found = forecast(config, plan.model.sizes, on)
        if found.traffic:
            kind = "uniform" if found.placement == "resident" else "diverse"
            expected.append((context, found.traffic[kind].decode))
        if (bound := bounds(config, plan.model.sizes, on)) is not None:
            at_most.append((context, bound.decode))
    if expected:
        yield _curve(plan.model.name, expected)
    if at_most and plan.forecast.placement == "resident":
        yield _curve(f"{plan.model.name}, at most", at_most, is_dashed=True)


def _curve(name: str, points: Sequence[tuple[int, float]], *, is_dashed: bool = False) -> Curve:
    return Curve(name, [x for x, _ in points], [y for _, y in points], is_dashed=is_dashed)


def _contexts(longest: int) -> list[int]:
    found = [_SHORTEST]
    while found[-1] * 2 < longest:
        found.append(found[-1] * 2)
    return [*found, longest] if longest > found[-1] else [longest]
