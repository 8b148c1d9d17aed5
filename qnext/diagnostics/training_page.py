"""What `qnext plan --train` finds and prints: work, hours, machines, memory and money of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qnext.config import ModelConfig
from qnext.diagnostics.plan_page import cost_text
from qnext.errors import UsageError
from qnext.parallel.train.traffic import StepTraffic, TrainShape
from qnext.planning import machine
from qnext.planning.accelerators import Cluster
from qnext.planning.cost import Prices, TokenCost, run_cost
from qnext.planning.machine import format_bytes
from qnext.planning.training_plan import STATES, TrainingPlan, TrainingWish, plan_training
from qnext.session.planned import PlannedModel

_PARTS = (
    ("projections", ("attention_projections", "delta_projections")),
    ("attention core", ("attention_core",)),
    ("delta core", ("delta_core",)),
    ("experts", ("router", "experts", "shared_experts", "dense_mlp")),
    ("head", ("head",)),
    ("MTP", ("mtp",)),
)


class LoraWish(NamedTuple):
    """An adapter, as `qnext train sft --lora` makes it."""

    targets: str
    rank: int


class TrainingReport(NamedTuple):
    """A run of one model on `cluster`, or here where that is None."""

    name: str
    cluster: Cluster | None
    plan: TrainingPlan
    cost: TokenCost | None
    peak: float
    sent: StepTraffic | None = None  # by all ranks, in a step of one micro batch on each

    def document(self) -> dict[str, Any]:
        """For programs."""
        device = None if self.cluster is None else self.cluster.name
        cost = None if self.cost is None else self.cost.document()
        sent = None if self.sent is None else self.sent.document()
        document = {"model": self.name, "device": device, "peak": self.peak, **self.plan.document()}
        return {**document, "sent_in_step": sent, "cost": cost}


def training_report(
    model: PlannedModel,
    wish: TrainingWish,
    cluster: Cluster | None,
    *,
    num_devices: int | None,
    prices: Prices,
    peak: float | None = None,
) -> TrainingReport:
    """On `num_devices` GPUs, or on the least that suffice; here with a measured `peak`, of fp32. `prices` are of one
    device."""
    if cluster is None:
        if peak is None:
            raise UsageError("--train: name a GPU with --machine, or measure this machine with --calibrate first")
        memory, ranks = machine.available_bytes(), 1
    else:
        memory, ranks, peak = cluster.device.memory_bytes, num_devices or 0, cluster.device.bf16
        prices = prices if prices.watts is not None else prices._replace(watts=cluster.device.watts)
    plan = plan_training(model.config, wish, peak=peak, memory_bytes=memory, num_ranks=ranks or None)
    cost = run_cost(prices, plan.device_hours * 3600) if prices.are_known else None
    return TrainingReport(model.name, cluster, plan, cost, peak, _sent(model.config, plan))


def _sent(config: ModelConfig, plan: TrainingPlan) -> StepTraffic | None:
    """None where parameters are not cut evenly, or most of them are not trained."""
    wish, ranks = plan.wish, plan.num_ranks
    if wish.kind == "lora" or ranks == 1 or ranks % wish.expert_parallel:
        return None
    states = STATES[wish.states]
    shape = TrainShape(
        ranks,
        wish.sequences * wish.sequence_length,
        accumulation=ranks,
        expert=wish.expert_parallel,
        recomputes=wish.recomputes,
        weight_bytes=states.weight,
        gradient_bytes=states.gradient,
        value_bytes=states.weight,
    )
    return StepTraffic.of(config, shape)


def lora_wish(config: ModelConfig, wish: TrainingWish, lora: LoraWish, frozen_bytes: int) -> TrainingWish:
    """The wish with the numbers of the adapter and the bytes of the weights below it."""
    from dataclasses import replace

    from qnext.lora import LoraConfig

    adapter = LoraConfig(targets=lora.targets, rank=lora.rank)  # type: ignore[arg-type]
    return replace(wish, adapter_parameters=adapter.num_parameters(config), frozen_bytes=frozen_bytes)


def format_training(reports: Sequence[TrainingReport]) -> str:
    """For people: a block for each model, and beside all but the first the ratio of the work."""
    lines: list[str] = []
    for number, report in enumerate(reports):
        lines += ([""] if lines else []) + list(_lines(report, reports[0] if number else None))
    return "\n".join(lines)


def _lines(report: TrainingReport, first: TrainingReport | None) -> Iterator[str]:
    plan, wish = report.plan, report.plan.wish
    each = STATES[wish.states]
    yield (
        f"{report.name}: {wish.kind} on {wish.tokens:,.3g} tokens in sequences of {wish.sequence_length:,}, "
        f"{plan.trained_parameters / 1e9:,.3g} B parameters trained"
    )
    passes = {"lora": "without gradients of the weights"}.get(wish.kind, "forward and backward")
    yield (
        f"  work: {plan.flops.total / 1e9:,.2f} GFLOP a token ({passes}{', recomputed' if wish.recomputes else ''}), "
        f"{plan.total_flops:,.3g} FLOP in all"
    )
    shares = ((name, sum(getattr(plan.flops, part) for part in parts)) for name, parts in _PARTS)
    yield "  of it " + ", ".join(f"{name} {count / plan.flops.total:.1%}" for name, count in shares if count)
    if first is not None:
        yield f"  {plan.total_flops / first.plan.total_flops:.2f} times the work of {first.name}"
    yield (
        f"  states: {each.total} bytes a trained parameter ({wish.states}: weight {each.weight}, gradient "
        f"{each.gradient}, copy {each.master}, moments {each.moments}), {format_bytes(plan.state_bytes)} in all"
    )
    yield from _hours(report)
    memory = plan.memory
    yield (
        f"  memory of a rank: {format_bytes(memory.total)}; weights {format_bytes(memory.weights)}, gradients "
        f"{format_bytes(memory.gradients)}, optimiser {format_bytes(memory.optimizer)}, gathered layers "
        f"{format_bytes(memory.gathered)}, activations {format_bytes(memory.activations)}, loss "
        f"{format_bytes(memory.loss)}" + (f", workspace {format_bytes(memory.workspace)}" if memory.workspace else "")
    )
    if (sent := report.sent) is not None:
        told = {name: format_bytes(count // plan.num_ranks) for name, count in sent.document().items()}
        yield (
            f"  a rank sends {told['total']} in a step of one micro batch on each: parameters {told['parameters']}, "
            f"gradients {told['gradients']}" + (f", experts {told['experts']}" if sent.experts else "")
        )
    if report.cost is not None:
        yield f"  costs: {cost_text(report.cost)}"


def _hours(report: TrainingReport) -> Iterator[str]:
    plan, wish = report.plan, report.plan.wish
    device = "this machine" if report.cluster is None else report.cluster.name
    peak = f"{report.peak / 1e12:,.4g} TFLOP/s"
    yield (
        f"  {plan.device_hours:,.4g} hours of {device} at {wish.mfu:.0%} (assumed) of {peak}; "
        f"{plan.days:,.3g} days on {plan.num_ranks:,} in {plan.nodes:,} node{'s' if plan.nodes > 1 else ''}"
    )
    if plan.least_ranks is None:
        yield "  does not fit, however many there are: fewer --sequences, --recompute, or --expert-parallel"
    elif plan.least_ranks > plan.num_ranks:
        yield f"  does not fit on {plan.num_ranks:,}: {plan.least_ranks:,} are needed"
    else:
        yield f"  fits on {plan.least_ranks:,} or more"
