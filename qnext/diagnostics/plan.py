"""What `qnext plan` says of a model: for people, for programs, and as a finding of `qnext doctor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from qnext.diagnostics.finding import Finding
from qnext.planning.forecast import Circumstances, Forecast, forecast, seconds_document, with_more_memory
from qnext.planning.machine import format_bytes
from qnext.planning.machines import PlannedMachine
from qnext.session.planned import ASSUMED_DISK, PlannedModel, circumstances

_MORE = (8 << 30, 16 << 30)  # bytes
_ROW = "  {:<12} {:>9} {:>14} {:>14}"
_MORE_ROW = "  {:<12} {:>9} {:>9} {:>9} {:>9} {:>14}"


class ModelPlan(NamedTuple):
    """One model on one machine, and what more memory would bring."""

    model: PlannedModel
    on: Circumstances
    forecast: Forecast
    more: dict[int, Forecast]
    assumed: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.forecast.placement != "too large"

    @property
    def problem(self) -> str:
        """Why it does not fit, and what would."""
        smaller = "; `--scheme int4-g32` plans for weights a quarter as large" if not self.model.is_quantized else ""
        return f"{self.model.name}: {self.forecast.problem}{smaller}"


def plan_model(
    model: PlannedModel,
    *,
    context: int | None = None,
    batch: int = 1,
    free_bytes: int | None = None,
    disk_rate: float | None = None,
    expert_bytes: int | None = None,
    other: PlannedMachine | None = None,
) -> ModelPlan:
    """For `batch` sequences of `context` tokens, here or on an`other` machine; what is not given is measured here, in a
    second or two."""
    on = circumstances(
        model,
        context=context,
        batch=batch,
        free_bytes=free_bytes,
        disk_rate=disk_rate,
        expert_bytes=expert_bytes,
        other=other,
    )
    found = forecast(model.config, model.sizes, on)
    is_fixed = found.placement == "resident" or expert_bytes is not None
    more = {} if is_fixed else with_more_memory(model.config, model.sizes, on, _MORE)
    reads_unknown = found.placement != "resident" and not model.files and disk_rate is None and other is None
    disk = (f"--disk-speed {ASSUMED_DISK / 1e9:g}g",) if reads_unknown else ()
    return ModelPlan(model, on, found, more, model.assumed + disk + (() if other is None else other.assumed))


def plan_document(plan: ModelPlan) -> dict[str, Any]:
    """For programs: bytes, shares, tokens a second."""
    return {
        "model": plan.model.name,
        "assumed": list(plan.assumed),
        "free_bytes": plan.on.free_bytes,
        "context": plan.on.context,
        "batch": plan.on.batch,
        "machine": plan.on.rates._asdict(),
        "other_weight_bytes": plan.model.sizes.experts.other_bytes,
        **_document(plan.forecast),
        "more_memory": [{"bytes": extra, **_document(found)} for extra, found in plan.more.items()],
    }


def _document(found: Forecast) -> dict[str, Any]:
    traffic = {name: speed.document() for name, speed in found.traffic.items()}
    prefill_time = {num_tokens: seconds_document(time) for num_tokens, time in found.prefill_time.items()}
    rates = {"prefill": found.prefill, "prefill_time": prefill_time}
    return {**asdict(found), **rates, "traffic": traffic, "used_bytes": found.used_bytes}


def format_plans(plans: Sequence[ModelPlan]) -> str:
    """For people; several models also side by side."""
    found = "\n\n".join("\n".join(_lines(plan)) for plan in plans)
    return found if len(plans) == 1 else "\n".join((found, "", *_side_by_side(plans)))


def _side_by_side(plans: Sequence[ModelPlan]) -> Iterator[str]:
    width = max(len(plan.model.name) for plan in plans)
    yield f"{'':<{width}}  {'weights':>9} {'in memory':>10}  decode, tokens/s"
    for plan in plans:
        found = plan.forecast
        speeds = [f"{name} {_speed(speed.decode)}" for name, speed in found.traffic.items()]
        decode = (
            "does not fit" if not plan.fits else speeds[0].partition(" ")[2] if found.share == 1 else ", ".join(speeds)
        )
        yield (
            f"{plan.model.name:<{width}}  {format_bytes(found.weight_bytes):>9} {format_bytes(found.used_bytes):>10}  "
            f"{decode}"
        )


def _lines(plan: ModelPlan) -> Iterator[str]:
    found, rates = plan.forecast, plan.on.rates
    weights, free = format_bytes(found.weight_bytes), format_bytes(plan.on.free_bytes)
    yield f"{plan.model.name}: weights {weights}, memory free {free}"
    if plan.assumed:
        yield f"  assumed: {', '.join(plan.assumed)}"
    yield f"  {placement_line(found)}"
    yield (
        f"  in memory: other weights {format_bytes(plan.model.sizes.experts.other_bytes)}, experts "
        f"{format_bytes(found.expert_bytes)}, keys and values {format_bytes(found.kv_bytes)} and states "
        f"{format_bytes(found.state_bytes)} of {plan.on.batch} x {plan.on.context:,} tokens, steps "
        f"{format_bytes(found.step_bytes)}"
    )
    yield (
        f"  rates: weights in memory are multiplied at {rates.memory / 1e9:.1f} GB/s, on prompts "
        f"{rates.arithmetic / 1e12:.2f} Top/s; disk {rates.disk / 1e9:.2f} GB/s"
    )
    if found.advice:
        yield f"  {found.advice}"
    if not plan.fits:
        return
    yield ""
    if found.placement == "resident":
        yield f"  decode: {_speed(found.traffic['uniform'].decode)} tokens/s"
    else:
        yield _ROW.format("traffic", "hit rate", "decode", "disk allows")
        for name, speed in found.traffic.items():
            ceiling = "-" if speed.ceiling is None else _speed(speed.ceiling)
            yield _ROW.format(name, f"{speed.hit_rate:.1%}", f"{_speed(speed.decode)} tokens/s", ceiling)
    yield "  prompts: " + ", ".join(f"{n:,} tokens at {_speed(rate)} tokens/s" for n, rate in found.prefill.items())
    if plan.more:
        yield ""
        yield _MORE_ROW.format("more memory", "experts", *found.traffic, f"prompt {max(found.prefill):,}")
        for extra, more in plan.more.items():
            speeds = [_speed(speed.decode) for speed in more.traffic.values()]
            prompt = _speed(more.prefill[max(more.prefill)])
            yield _MORE_ROW.format(f"+ {format_bytes(extra)}", f"{more.share:.1%}", *speeds, prompt)


def streaming_finding(plan: ModelPlan) -> Finding:
    """Whether a model fits whose experts do not all stay in memory."""
    found, data = plan.forecast, plan_document(plan)
    if not plan.fits:
        advice = "`qnext plan MODEL --memory SIZE` says with how much memory it would"
        return Finding("memory plan", "problem", placement_line(found), advice, data)
    text = (
        f"{placement_line(found)}; {format_bytes(found.expert_bytes)} of {format_bytes(plan.on.free_bytes)} are theirs"
    )
    return Finding("memory plan", "ok", text, data=data)


def speed_finding(plan: ModelPlan) -> Finding:
    """How fast a model will be that fits, and with more memory."""
    found = plan.forecast
    longest = max(found.prefill)
    text = f"predicted: {_decode(found)}; prompts of {longest:,} tokens at {_speed(found.prefill[longest])} tokens/s"
    for extra, more in plan.more.items():
        text += f"; with {format_bytes(extra)} more {_decode(more)}"
    return Finding("speed", "ok", text, data=plan_document(plan))


def _decode(found: Forecast) -> str:
    if found.placement == "resident":
        return f"decode {_speed(found.traffic['uniform'].decode)} tokens/s"
    speeds = (f"{_speed(speed.decode)} {name}" for name, speed in found.traffic.items())
    return f"decode tokens/s {', '.join(speeds)}"


def placement_line(found: Forecast) -> str:
    """Where the weights are, in a line."""
    if found.placement == "resident":
        return "fits: all weights stay in memory"
    if found.placement == "too large":
        return f"does not fit: {found.problem}"
    return (
        f"fits with experts on disk: {found.share:.1%} of them stay in memory, "
        f"{format_bytes(found.disk_bytes)} are read when they are needed"
    )


def _speed(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"
