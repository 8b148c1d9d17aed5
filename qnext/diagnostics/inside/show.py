"""Reports of the inside of models as tables and pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np
from rich.console import Console
from rich.table import Table

from qnext.diagnostics.inside.panels import Panel, write_panels
from qnext.diagnostics.inside.report import AttentionReport, DeltaReport, InsideReport, TopToken

_NEAR, _FAR = 16, 256  # distances at which the table cuts


def show_inside(report: InsideReport, text_of: Callable[[int], str]) -> None:
    """A table of full-attention layers and one of Gated DeltaNet layers. `text_of` gives the token at a position."""
    if report.attention:
        _print(_attention_table(report, text_of))
    if report.delta:
        _print(_delta_table(report, text_of))


def write_inside(path: Path, report: InsideReport, *, title: str) -> None:
    """The layers of each kind by heads, and by distances."""
    bins, above, below = [str(start) for start in report.bins], [], []
    if attention := report.attention:
        labels = [str(layer.layer) for layer in attention]
        above.append(_panel("attention to the first token", labels, [each.first_token for each in attention], 0, 1))
        if attention[0].gate:
            above.append(_panel("gate, mean of sigmoid", labels, [each.gate for each in attention], 0, 1))
        shares = np.array([np.mean(each.distance, axis=0) for each in attention])
        above.append(Panel("attention by distance", shares, labels, "tokens back, from", bins, low=0.0))
    if delta := report.delta:
        labels = [str(layer.layer) for layer in delta]
        half_lives = np.array([each.half_life for each in delta])
        below.append(Panel("half-life of the state, tokens", half_lives, labels, "head", is_log=True))
        below.append(_panel("effective rank of the state", labels, [each.state_rank for each in delta], 1))
        read_from = np.array([each.distance for each in delta])
        below.append(Panel("reads by distance", read_from, labels, "tokens back, from", bins, low=0.0))
    sizes = np.array([report.largest]).T
    numbers = [str(number) for number in range(len(sizes))]
    (below or above).append(Panel("largest activation", sizes, numbers, "", [""], is_log=True))
    write_panels(path, [row for row in (above, below) if row], title=title)


def _panel(
    title: str, labels: Sequence[str], rows: Sequence[Sequence[float]], low: float, high: float | None = None
) -> Panel:
    return Panel(title, np.array(rows), labels, "head", low=low, high=high)


def _attention_table(report: InsideReport, text_of: Callable[[int], str]) -> Table:
    names = ["layer", "first token", "entropy", f"within {_NEAR}", f"beyond {_FAR}", "gate", "closed", "largest"]
    table = _table(names)
    for layer in report.attention:
        shares = np.mean(layer.distance, axis=0)
        near = sum(share for start, share in zip(report.bins, shares, strict=True) if start < _NEAR)
        far = sum(share for start, share in zip(report.bins, shares, strict=True) if start >= _FAR)
        table.add_row(
            str(layer.layer),
            _percent_and_most(layer.first_token),
            f"{fmean(layer.entropy):.2f}",
            f"{near:.1%}",
            f"{far:.1%}",
            f"{fmean(layer.gate):.3f}" if layer.gate else "-",
            f"{fmean(layer.closed):.1%}" if layer.closed else "-",
            _largest(report, layer),
            _tokens(layer.top, text_of),
        )
    return table


def _delta_table(report: InsideReport, text_of: Callable[[int], str]) -> Table:
    names = ["layer", "half-life", "10 % to 90 %", "longest head", "beta", "gate", "state", "rank", "read", "decoded"]
    table = _table([*names, "reach", "largest"])
    for layer in report.delta:
        longest = max(range(len(layer.half_life)), key=layer.half_life.__getitem__)
        table.add_row(
            str(layer.layer),
            _tokens_of(median(layer.half_life)),
            f"{_tokens_of(median(layer.half_life_low))} to {_tokens_of(median(layer.half_life_high))}",
            f"{longest}: {_tokens_of(layer.half_life[longest])}",
            f"{fmean(layer.beta):.3f}",
            f"{fmean(layer.gate):.3f}",
            f"{fmean(layer.state_norm):.3g}",
            f"{fmean(layer.state_rank):.1f}",
            f"{fmean(layer.read):.3g}",
            f"{fmean(layer.decoded_read):.3g}" if layer.decoded_read else "-",
            _tokens_of(median(layer.reach)),
            _largest(report, layer),
            _tokens(layer.top, text_of),
        )
    return table


def _table(names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most read", no_wrap=True)
    return table


def _print(table: Table) -> None:
    # A pipe has no width to keep to.
    Console(highlight=False, width=None if sys.stdout.isatty() else 240, markup=False).print(table)


def _percent_and_most(values: Sequence[float]) -> str:
    return f"{fmean(values):.1%}, most {max(values):.1%}"


def _tokens_of(number: float) -> str:
    return f"{number:.3g}" if number < 1e4 else f"{number:.1e}"


def _largest(report: InsideReport, layer: AttentionReport | DeltaReport) -> str:
    return f"{report.largest[layer.layer]:.3g} ({report.largest[layer.layer] / report.rms[layer.layer]:.0f} rms)"


def _tokens(top: Sequence[TopToken], text_of: Callable[[int], str]) -> str:
    return " ".join(f"{text_of(each.position)!r}@{each.position}:{each.share:.1%}" for each in top)
