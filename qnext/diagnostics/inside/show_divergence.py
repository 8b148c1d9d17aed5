"""Where two models part, as a table and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qnext.diagnostics.charts import Axis, Curve, LineChart, write_charts
from qnext.diagnostics.inside.divergence import Divergence, TapDifference, WeightDifferences

_MOST_NAMES = 4


def show_divergence(found: Divergence) -> None:
    """A line for weights, taps and logits each, and a row for each layer."""
    print(f"weights: {_weights(found.weights)}")
    if found.only_a or found.only_b:
        print(f"taps of one model alone: {_names(found.only_a)} / {_names(found.only_b)}")
    first, beyond = found.first_bits, found.first_beyond
    if first is None:
        print("every tap has the same bits")
    else:
        print(f"first other bits: {_place(first)}")
        text = "none" if beyond is None else _place(beyond)
        print(f"first beyond a relative error of {found.tolerance:g}: {text}")
    if (logits := found.logits) is None:
        print("logits: the vocabularies differ")
    else:
        print(
            f"logits: KL {logits.mean_kl:.3g} on average, {logits.largest_kl:.3g} at most (token "
            f"{logits.largest_kl_at}); the same likeliest token after {logits.same_first:.1%}; "
            f"largest difference {logits.largest:.3g}"
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160, markup=False).print(_table(found))


def write_divergence(path: Path, found: Divergence, *, title: str) -> None:
    """Relative errors and, for sparse models, the agreement of routers, by layer."""
    series = [_series(name, found.of_layers(part)) for name, part in _DRAWN if found.of_layers(part)]
    charts = [LineChart("relative error", Axis("layer"), Axis("|a - b| / |a|", is_log=True), series)]
    if routers := found.of_layers("router.experts"):
        layers, shares = _layers(routers), [1 - each.relative for each in routers]
        axis = Axis("choices that agree", low=0.0, high=1.0)
        charts.append(LineChart("routers", Axis("layer"), axis, [Curve("experts", layers, shares)]))
    write_charts(path, charts, title=title)


_DRAWN = (("residual stream", "residual_out"), ("mixer", "mixer_out"), ("feed-forward", "ffn_out"))


def _series(name: str, taps: Sequence[TapDifference]) -> Curve:
    return Curve(name, _layers(taps), [tap.relative for tap in taps])


def _layers(taps: Sequence[TapDifference]) -> list[float]:
    return [float(tap.tap.split(".")[1]) for tap in taps]


def _table(found: Divergence) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "mixer", "feed-forward", "residual", "worst token", "cosine", "experts agree", "first other"):
        table.add_column(name, justify="right", no_wrap=True)
    by_name = {tap.tap: tap for tap in found.taps}
    for tap in found.of_layers("residual_out"):
        prefix = tap.tap.removesuffix(".residual_out")
        experts = by_name.get(f"{prefix}.router.experts")
        own = [each for each in found.taps if each.tap.startswith(f"{prefix}.") and not each.is_equal]
        table.add_row(
            prefix.removeprefix("layers."),
            f"{by_name[f'{prefix}.mixer_out'].relative:.3g}",
            f"{by_name[f'{prefix}.ffn_out'].relative:.3g}",
            f"{tap.relative:.3g}",
            f"{tap.worst_relative:.3g}",
            f"{tap.cosine:.7f}",
            "-" if experts is None else f"{1 - experts.relative:.2%}",
            own[0].tap.removeprefix(f"{prefix}.") if own else "-",
        )
    return table


def _place(tap: TapDifference) -> str:
    return f"{tap.tap} at token {tap.first_token} (relative {tap.relative:.3g}, worst token {tap.worst_relative:.3g})"


def _weights(found: WeightDifferences) -> str:
    if found.are_none:
        return f"all {found.num_equal} tensors are equal"
    told = [f"{found.num_equal} tensors are equal"]
    for names, what in (
        (found.other_bits, "have other bits"),
        (found.other_form, "another shape or dtype"),
        (found.only_a, "are in the first alone"),
        (found.only_b, "are in the second alone"),
    ):
        if names:
            told.append(f"{len(names)} {what}: {_names(names)}")
    return "; ".join(told)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(names[:_MOST_NAMES]) or "none") + more
