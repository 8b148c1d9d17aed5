"""What `qnext plan` prints: one model on a page, several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qnext.diagnostics.plan import ModelPlan, placement_line, speed_text
from qnext.planning.cost import TokenCost
from qnext.planning.machine import format_bytes
from qnext.planning.measured import told_errors
from qnext.session.planned import bytes_by_scheme

_ROW = "  {:<12} {:>9} {:>14} {:>14}"
_MORE_ROW = "  {:<12} {:>9} {:>9} {:>9} {:>9} {:>14}"
_PART_ROW = "  {:<22} {:>13} {:>10} {:>11} {:>11} {:>11}"
_DTYPE_NAMES = {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "int8": "int8", "float32": "fp32"}


def format_plans(plans: Sequence[ModelPlan]) -> str:
    """For people: a page, or several models in one table."""
    return "\n".join(_page(plans[0]) if len(plans) == 1 else _side_by_side(plans))


def _page(plan: ModelPlan) -> Iterator[str]:
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
    disk = f"; disk {rates.disk / 1e9:.2f} GB/s" if rates.disk else ""
    yield (
        f"  rates: weights in memory are multiplied at {rates.memory / 1e9:.1f} GB/s, on prompts "
        f"{rates.arithmetic / 1e12:.2f} Top/s{disk}"
    )
    yield f"  {calibration_line(plan)}"
    if found.advice:
        yield f"  {found.advice}"
    if plan.fits:
        yield ""
        yield from _speeds(plan)
        fitting = ", ".join(f"{count:,} of {length:,}" for length, count in plan.fitting().items())
        yield f"  sequences that fit, of so many tokens each: {fitting}"
        yield from (f"  a million tokens of {name}s: {cost_text(cost)}" for name, cost in plan.costs.items())
    yield ""
    yield from _parts(plan)
    yield from _schemes(plan)
    yield ""
    yield from _sequences(plan)
    if plan.ranks is not None:
        yield from plan.ranks.lines()


def calibration_line(plan: ModelPlan) -> str:
    """Where the speeds come from."""
    if plan.on.speed is not None and plan.calibration is not None:
        errors = plan.calibration.errors[plan.model.precision]
        told = ", ".join(f"{kind} {error:.0%}" for kind, error in errors.items())
        measured = f"; {told_errors(plan.measured)}" if plan.measured else ""
        return f"speeds: {plan.calibration.told}, whose times it gives back within (median) {told}{measured}"
    if plan.on.speed is not None:
        return "speeds: from published peaks and the assumptions above"
    if plan.calibration is not None:
        return f"speeds: by the rates; {plan.calibration.told} has none for {plan.model.precision} weights"
    return "speeds: by the rates, not calibrated; `qnext plan --calibrate` measures this machine once"


def cost_text(cost: TokenCost) -> str:
    """Money in whatever currency its prices have, and energy."""
    money = "" if cost.money is None else f"{cost.money:,.4g} of the price's currency"
    return ", ".join(filter(None, (money, "" if cost.kwh is None else f"{cost.kwh:,.3g} kWh")))


def _speeds(plan: ModelPlan) -> Iterator[str]:
    found = plan.forecast
    if found.placement == "resident":
        yield f"  decode: {speed_text(found.traffic['uniform'].decode)} tokens/s"
    else:
        yield _ROW.format("traffic", "hit rate", "decode", "disk allows")
        for name, speed in found.traffic.items():
            ceiling = "-" if speed.ceiling is None else speed_text(speed.ceiling)
            yield _ROW.format(name, f"{speed.hit_rate:.1%}", f"{speed_text(speed.decode)} tokens/s", ceiling)
        yield "  hits where such a share of the experts stays in memory:"
        for name, curve in plan.hit_curve().items():
            yield f"    {name:<10}" + ", ".join(f"{share:.0%}: {rate:.0%}" for share, rate in curve.items())
    if plan.bounds is not None:
        yield (
            f"  at most, by the peaks: decode {speed_text(plan.bounds.decode)} tokens/s "
            f"({plan.bounds.bytes_per_token / 1e9:.2f} GB and {plan.bounds.operations_per_token / 1e9:.2f} GFLOP a "
            f"token), prompts {speed_text(plan.bounds.prompt)}"
        )
    yield "  prompts: " + ", ".join(f"{n:,} tokens at {speed_text(rate)} tokens/s" for n, rate in found.prefill.items())
    if plan.more:
        yield ""
        yield _MORE_ROW.format("more memory", "experts", *found.traffic, f"prompt {max(found.prefill):,}")
        for extra, more in plan.more.items():
            speeds = [speed_text(speed.decode) for speed in more.traffic.values()]
            prompt = speed_text(more.prefill[max(more.prefill)])
            yield _MORE_ROW.format(f"+ {format_bytes(extra)}", f"{more.share:.1%}", *speeds, prompt)


def _parts(plan: ModelPlan) -> Iterator[str]:
    """Parameters, bytes and work of each part."""
    known = plan.anatomy
    yield _PART_ROW.format("MFLOP of a token:", "parameters", "bytes", "decode", "prompt", "training")
    for part in known.parts():
        work = [_or_dash(value / 1e6, ",.1f") for value in part[3:]]
        size = format_bytes(part.num_bytes) if part.num_bytes else "-"
        yield _PART_ROW.format(part.name, _or_dash(part.parameters, ","), size, *work)
    totals = [known.decode.total, known.prompt.total / known.context, known.training.total]
    work = [f"{total / 1e6:,.1f}" for total in totals]
    size = format_bytes(sum(known.part_bytes.values()))
    yield _PART_ROW.format("in all", f"{known.parameters.total:,}", size, *work)
    yield (
        f"  active {known.active.with_head / 1e9:.2f} B parameters a token, {known.active.without_head / 1e9:.2f} B "
        f"without the head, {known.active.without_head / known.parameters.trunk:.1%} of the trunk; decoding after "
        f"{known.context:,} tokens, prompts and sequences of training of {known.context:,}"
    )


def _schemes(plan: ModelPlan) -> Iterator[str]:
    totals = {
        scheme: sum(count for part, count in parts.items() if part != "records")
        for scheme, parts in bytes_by_scheme(plan.model.config).items()
    }
    yield "  weights in " + ", ".join(f"{scheme} {format_bytes(total)}" for scheme, total in totals.items())


def _sequences(plan: ModelPlan) -> Iterator[str]:
    """What each sequence carries, what it costs to keep a prefix, which experts a batch touches, what drafts bring."""
    known, config = plan.anatomy, plan.model.config
    kv = ", ".join(f"{_DTYPE_NAMES[name]} {count / 1024:.1f} KiB" for name, count in known.kv_per_token.items())
    yield f"  keys and values of a token: {kv}"
    if config.num_linear_layers:
        states = ", ".join(f"{_DTYPE_NAMES[name]} {format_bytes(each.total)}" for name, each in known.states.items())
        yield f"  states of a sequence: {states}; as much as keys and values of {known.snapshot_tokens:,.0f} tokens"
        yield f"  states of cached prefixes of {known.context:,} tokens: {format_bytes(known.prefix_bytes)} a prompt"
    if known.distinct:
        counts = ", ".join(f"{batch}: {count:,.0f}" for batch, count in known.distinct.items())
        yield f"  experts of a layer that a step of so many sequences touches, of {config.num_experts}: {counts}"
    if plan.drafts is not None:
        gains = "; ".join(
            f"{gain.num_drafts}: {gain.tokens:.2f} tokens for {gain.read_ratio:.2f} x the bytes, {gain.speedup:.2f} x"
            for gain in plan.drafts.gains
        )
        yield f"  drafts of a step, {plan.drafts.acceptance:.0%} of them accepted (assumed): {gains}"


def _side_by_side(plans: Sequence[ModelPlan]) -> Iterator[str]:
    """A row for each figure, a column for each model, and beside all but the first the ratio to it."""
    first = plans[0]
    rows: list[list[str]] = [["", *(plan.model.name for plan in plans)]]
    for name, values in _figures(plans):
        cells = [values[0][1]]
        for value, text in values[1:]:
            base = values[0][0]
            cells.append(f"{text} ({value / base:.2f}x)" if base and value else text)
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()
    yield ""
    yield f"{first.on.batch} x {first.on.context:,} tokens, memory free {format_bytes(first.on.free_bytes)}"
    for plan in plans:
        assumed = f"; assumed: {', '.join(plan.assumed)}" if plan.assumed else ""
        yield f"{plan.model.name}: {placement_line(plan.forecast)}{assumed}"
        if plan.ranks is not None:
            yield from plan.ranks.lines()


def _figures(plans: Sequence[ModelPlan]) -> Iterator[tuple[str, list[tuple[float, str]]]]:
    """Name, and of each model the value and its text."""
    all_known = [plan.anatomy for plan in plans]
    yield "parameters, B", [_number(known.parameters.total / 1e9) for known in all_known]
    yield "active, B", [_number(known.active.with_head / 1e9) for known in all_known]
    yield "weights", [_bytes(plan.forecast.weight_bytes) for plan in plans]
    yield "in memory", [_bytes(plan.forecast.used_bytes) for plan in plans]
    yield "keys and values", [_bytes(plan.forecast.kv_bytes) for plan in plans]
    yield "states", [_bytes(plan.forecast.state_bytes) for plan in plans]
    yield "prompt, TFLOP", [_number(known.prompt.total / 1e12) for known in all_known]
    yield "decode, GFLOP a token", [_number(known.decode.total / 1e9) for known in all_known]
    yield "training, GFLOP a token", [_number(known.training.total / 1e9) for known in all_known]
    names = {name for plan in plans if plan.forecast.placement == "streamed" for name in plan.forecast.traffic}
    for name in [each for each in ("uniform", "diverse", "service") if each in names] or ["uniform"]:
        label = f"decode, tokens/s, {name}" if names else "decode, tokens/s"
        yield label, [_speed_of(plan, name) for plan in plans]
    for length in sorted({n for plan in plans for n in plan.forecast.prefill}):
        rates = [plan.forecast.prefill.get(length, 0.0) for plan in plans]
        yield f"prompt {length:,}, tokens/s", [(rate, speed_text(rate) if rate else "-") for rate in rates]


def _speed_of(plan: ModelPlan, traffic: str) -> tuple[float, str]:
    if not plan.fits:
        return 0.0, "does not fit"
    rate = plan.forecast.traffic[traffic].decode
    return rate, speed_text(rate)


def _number(value: float) -> tuple[float, str]:
    return value, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _bytes(count: int) -> tuple[float, str]:
    return count, format_bytes(count) if count else "-"


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if value else "-"
