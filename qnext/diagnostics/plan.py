"""What `qnext plan` finds for a model: for programs, and as a finding of `qnext doctor`. plan_page.py is for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from qnext.diagnostics.finding import Finding
from qnext.diagnostics.rank_plan import RankPlan, plan_ranks
from qnext.planning.anatomy import Anatomy, anatomy
from qnext.planning.calibration import Calibration
from qnext.planning.cost import Prices, TokenCost, token_cost
from qnext.planning.expert_speed import TRAFFIC, expected_hit_rate
from qnext.planning.forecast import (
    Bounds,
    Circumstances,
    Forecast,
    bounds,
    forecast,
    seconds_document,
    with_more_memory,
)
from qnext.planning.machine import format_bytes
from qnext.planning.measured import MeasuredFigure
from qnext.planning.plan import sequences_that_fit
from qnext.planning.speculation import DraftedModel, DraftGains, drafts
from qnext.session.planned import (
    ASSUMED_DISK,
    Asked,
    PlannedModel,
    bytes_by_scheme,
    calibration_of,
    circumstances,
    measured_of,
)

_LENGTHS = (4096, 32_768, 131_072)  # tokens
_SHARES_IN_MEMORY = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
_MORE = (8 << 30, 16 << 30)  # bytes
_NOTHING = Asked()


class ModelPlan(NamedTuple):
    """One model on one machine, and what more memory would bring."""

    model: PlannedModel
    on: Circumstances
    anatomy: Anatomy
    drafts: DraftGains | None
    forecast: Forecast
    more: dict[int, Forecast]
    assumed: tuple[str, ...]
    prices: Prices
    bounds: Bounds | None
    calibration: Calibration | None
    measured: tuple[MeasuredFigure, ...]  # of this machine, whatever the model
    ranks: RankPlan | None = None  # where there are several

    @property
    def fits(self) -> bool:
        return self.forecast.placement != "too large"

    @property
    def costs(self) -> dict[str, TokenCost]:
        """Of a million tokens of prompts of the context's length, and of answers behind them; none where nothing has a
        price."""
        if not (self.fits and self.prices.are_known):
            return {}
        prompts = self.forecast.prefill
        return {
            "prompt": token_cost(self.prices, prompts[max(prompts)]),
            "answer": token_cost(self.prices, self.forecast.traffic["uniform"].decode),
        }

    def fitting(self) -> dict[int, int]:
        """Sequences of so many tokens that fit beside the weights that are in memory."""
        found, config = self.forecast, self.model.config
        left = self.on.free_bytes - (found.used_bytes - found.kv_bytes - found.state_bytes)
        lengths = [each for each in _LENGTHS if each < config.context_length] + [config.context_length]
        return sequences_that_fit(config, left, lengths)

    def hit_curve(self) -> dict[str, dict[float, float]]:
        """By kind of traffic: the share of a token's experts that is found in memory, where such a share of all stays
        there; none for a model without experts."""
        config = self.model.config
        if not config.num_experts:
            return {}
        used = config.num_experts_per_tok / config.num_experts
        return {
            name: {share: expected_hit_rate(name, share, used_share=used) for share in _SHARES_IN_MEMORY}
            for name in TRAFFIC
        }

    @property
    def problem(self) -> str:
        """Why it does not fit, and what would."""
        smaller = "; `--scheme int4-g32` plans for weights a quarter as large" if not self.model.is_quantized else ""
        return f"{self.model.name}: {self.forecast.problem}{smaller}"


def plan_model(model: PlannedModel, asked: Asked = _NOTHING) -> ModelPlan:
    """What is not asked for is measured here, in a second or two."""
    on, other = circumstances(model, asked), asked.other
    found = forecast(model.config, model.sizes, on)
    is_fixed = found.placement == "resident" or asked.expert_bytes is not None
    more = {} if is_fixed else with_more_memory(model.config, model.sizes, on, _MORE)
    reads_unknown = found.placement != "resident" and not model.files and asked.disk_rate is None and other is None
    disk = (f"--disk-speed {ASSUMED_DISK / 1e9:g}g",) if reads_unknown else ()
    assumed = model.assumed + disk + (() if other is None else other.assumed)
    known = anatomy(model.config, model.part_bytes, context=on.context)
    stored = DraftedModel.of(model.config, model.sizes, model.part_bytes)
    sped = drafts(model.config, stored, context=on.context, batch=asked.batch, acceptance=asked.acceptance)
    prices = asked.prices
    if other is not None and other.cluster is not None and prices.watts is None:
        prices = prices._replace(watts=other.cluster.watts)
        assumed = (*assumed, f"{prices.watts:,.0f} W, what the GPUs draw at most")
    bound = bounds(model.config, model.sizes, on)
    calibration = calibration_of(asked)
    measured = () if calibration is None else tuple(measured_of(asked))
    ranks = plan_ranks(model, asked.mesh) if asked.mesh.num_ranks > 1 else None
    return ModelPlan(model, on, known, sped, found, more, assumed, prices, bound, calibration, measured, ranks)


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
        **plan.anatomy.document(),
        "bytes_by_scheme": bytes_by_scheme(plan.model.config),
        "calibration": None if plan.calibration is None else plan.calibration.told,
        "hit_curve": {name: {str(k): v for k, v in curve.items()} for name, curve in plan.hit_curve().items()},
        "measured": [each._asdict() for each in plan.measured],
        "bounds": None if plan.bounds is None else plan.bounds._asdict(),
        "fitting_sequences": {str(length): count for length, count in plan.fitting().items()} if plan.fits else {},
        "costs": {name: cost.document() for name, cost in plan.costs.items()},
        "drafts": None if plan.drafts is None else plan.drafts.document(),
        "ranks": None if plan.ranks is None else plan.ranks.document(),
        "more_memory": [{"bytes": extra, **_document(found)} for extra, found in plan.more.items()],
    }


def _document(found: Forecast) -> dict[str, Any]:
    traffic = {name: speed.document() for name, speed in found.traffic.items()}
    prefill_time = {num_tokens: seconds_document(time) for num_tokens, time in found.prefill_time.items()}
    rates = {"prefill": found.prefill, "prefill_time": prefill_time}
    return {**asdict(found), **rates, "traffic": traffic, "used_bytes": found.used_bytes}


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
    text = (
        f"predicted: {_decode(found)}; prompts of {longest:,} tokens at {speed_text(found.prefill[longest])} tokens/s"
    )
    for extra, more in plan.more.items():
        text += f"; with {format_bytes(extra)} more {_decode(more)}"
    return Finding("speed", "ok", text, data=plan_document(plan))


def _decode(found: Forecast) -> str:
    if found.placement == "resident":
        return f"decode {speed_text(found.traffic['uniform'].decode)} tokens/s"
    speeds = (f"{speed_text(speed.decode)} {name}" for name, speed in found.traffic.items())
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


def speed_text(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"
