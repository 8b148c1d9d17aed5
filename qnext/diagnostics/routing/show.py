"""What was found about routers, as tables for people on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from qnext.diagnostics.routing.ablation import Ablation
from qnext.diagnostics.routing.agreement import Agreement
from qnext.diagnostics.routing.drift import Drift
from qnext.diagnostics.routing.pairs import Coactivation, ExpertPair
from qnext.eval.intervals import Interval

_REMOVALS = {"reroute": "the next best takes the place", "zero": "nothing takes the place"}


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str, last: str | None = None) -> None:
    """A line that says what follows, then columns of numbers; `last` is a column of words at their end."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        table.add_column(last)
    for row in rows:
        table.add_row(*row)
    print(f"\n{title}")
    # A pipe has no width to keep to.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def show_pairs(found: Coactivation) -> None:
    rows = [[each.label, str(len(each.groups)), _words(each.pairs, "+")] for each in found.layers]
    show_table(("layer", "groups"), rows, title="experts that tokens choose together (pair:lift)", last="surest pairs")
    moves = []
    for step in found.steps:
        hits = _percent(step.hit_ratio), _percent(step.hit_ratio_without)
        moves.append([f"{step.label}>{step.next_label}", *hits, _words(step.pairs, ">")])
    title = "from a layer to the next sparse one (hits: choices guessed from the layer before, and from the load alone)"
    show_table(("layers", "hits", "load alone"), moves, title=title, last="surest pairs")


def show_drift(found: Drift) -> None:
    rows = []
    for each in found.layers:
        numbers = f"{each.distance:.1%}", f"{each.noise:.1%}", _range(each.interval), f"{each.probability:.3f}"
        rows.append([each.label, *numbers, "yes" if each.is_real else "no"])
    columns = ("layer", "distance", "noise", "interval 95 %", "p", "drift")
    show_table(columns, rows, title=f"drift of {found.of}")


def show_agreement(found: Agreement) -> None:
    rows = []
    for each in found.layers:
        parts = f"{each.overlap:.1%}", _range(each.interval), f"{each.same_set:.1%}", f"{each.same_first:.1%}"
        ranks = "-" if each.rank_correlation is None else f"{each.rank_correlation:.4f}"
        rows.append([each.label, *parts, f"{each.divergence:.4f}", ranks])
    columns = ("layer", "overlap", "interval 95 %", "same set", "same first", "KL (nats)", "rank corr.")
    show_table(columns, rows, title="agreement of the routers, token by token")
    print("overlap along the text: " + " ".join(f"{part:.1%}" for part in found.by_position))
    if found.worst:
        print("least alike at the tokens: " + ", ".join(f"{place} ({part:.0%})" for place, part in found.worst))


def show_ablation(found: Ablation) -> None:
    rows = []
    for each in found.effects:
        value, low, high = (f"{bits:+.5f}" for bits in each.effect)
        own = "-" if each.own_effect is None else f"{each.own_effect:+.4f}"
        shares = f"{each.token_share:.1%}", f"{each.mass_share:.2%}"
        rows.append([each.label, str(each.expert), *shares, value, f"{low} to {high}", own])
    columns = ("layer", "expert", "tokens", "mass", "bits per byte", "interval 95 %", "bits per own token")
    title = f"without an expert ({_REMOVALS[found.removal]}); all experts: {found.bits_per_byte:.4f} bits per byte"
    show_table(columns, rows, title=title)
    known = [f"{label}:{value:+.2f}" for label, value in found.rank_correlations.items() if value is not None]
    if found.mean_correlation is not None:
        print(f"rank correlation of mass and effect: {found.mean_correlation:+.2f} (by layer {' '.join(known)})")


def _words(pairs: Sequence[ExpertPair], sign: str) -> str:
    return " ".join(f"{each.first}{sign}{each.second}:{each.lift:.1f}" for each in pairs) or "-"


def _range(found: Interval) -> str:
    return f"{found.low:.1%} to {found.high:.1%}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
