"""Findings, parts of a model and loads of its experts as tables for people, on standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qnext.diagnostics.inventory import ModelInventory, inventory_document
from qnext.planning.machine import format_bytes

if TYPE_CHECKING:
    from qnext.diagnostics.experts import LayerComparison, LayerReport
    from qnext.diagnostics.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def show_inventory(report: ModelInventory) -> None:
    """Parts with their parameters, then tensors."""
    from qnext.checkpoint.provenance import chain_of

    values = inventory_document(report)
    console = Console(highlight=False, soft_wrap=True)
    config, parameters = report.config, values["parameters"]
    kinds = f"{config.num_linear_layers} linear, {config.num_full_layers} full attention"
    print(f"{report.name}: {config.num_hidden_layers} layers ({kinds}), hidden {config.hidden_size}")
    if config.num_experts:
        print(
            f"{config.num_experts} experts of width {config.moe_intermediate_size}, {config.num_experts_per_tok} chosen"
        )
    print(f"vocabulary {config.vocab_size:,}, context {config.context_length:,}")
    parts = Table("part", "parameters", "stored", box=None)
    parts.columns[1].justify = "right"
    stored = report.dtypes_by_part or {}
    for name, count in parameters.items():
        if count:
            parts.add_row(name.replace("_", " "), f"{count:,}", " + ".join(stored.get(name, {})))
    console.print(parts)
    if report.num_bytes is not None and report.dtypes is not None:
        dtypes = ", ".join(f"{name} {count:,}" for name, count in report.dtypes.items())
        print(f"on disk {format_bytes(report.num_bytes)}: {dtypes}")
    if report.packed is not None:
        print("packed weights: " + ", ".join(f"{form} {count:,}" for form, count in report.packed.items()))
    if report.model is not None:
        print(f"fingerprint {report.model}")
    if report.provenance is not None:
        print("made by " + "\n".join(chain_of(report.provenance)))
    print(f"KV per 1,000 tokens {format_bytes(values['kv_bytes_per_1000_tokens'])} (bfloat16)")
    print(f"state per sequence {format_bytes(values['state_bytes_per_sequence']['total'])}")
    tensors = Table("tensor", "shape", "dtype", "count", box=None)
    for row in report.tensors:
        tensors.add_row(row.name, str(row.shape).replace("[", r"\["), row.dtype or "-", f"{row.count:,}")
    console.print(tensors)


def show_experts(layers: list[LayerReport], comparisons: list[LayerComparison]) -> None:
    """A row for each layer; `comparisons` are none, or one for each."""
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "tokens", "entropy", "balance", "top 1 %", "dead"):
        table.add_column(name, justify="right", no_wrap=True)
    if comparisons:
        for name in ("distance", "overlap", "change of entropy", "newly dead"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("hottest")
    for index, layer in enumerate(layers):
        row = [layer.label, f"{layer.num_tokens:,}", f"{layer.entropy:.3f}", f"{layer.balance:.3f}"]
        row += [f"{layer.top_percent:.1%}", str(len(layer.dead))]
        if comparisons:
            each = comparisons[index]
            row += [f"{each.distance:.1%}", f"{each.overlap:.0%}", f"{each.entropy_change:+.3f}"]
            row += [str(len(each.newly_dead))]
        table.add_row(*row, " ".join(f"{expert}:{share:.1%}" for expert, share in layer.hottest))
    # A pipe has no width to keep to.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def show_findings(sections: dict[str, list[Finding]]) -> None:
    """A table for each section; below a text its advice."""
    console = Console(highlight=False)
    for findings in sections.values():
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            text = Text(finding.text)
            if finding.advice:
                text.append(f"\n{finding.advice}", style="italic")
            table.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.name, text)
        console.print(table)
        console.print()
