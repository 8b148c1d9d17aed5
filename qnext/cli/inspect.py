"""`qnext inspect`: what a model consists of, from its headers alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli._types import Strict

if TYPE_CHECKING:
    from qnext.config import ModelConfig


@dataclass(frozen=True)
class _Tensors:
    """Distinct tensors: layers and experts of the same name, shape and dtype are one row."""

    name: str
    shape: list[int]
    dtype: str | None
    count: int


@dataclass(frozen=True)
class _Report:
    name: str
    config: ModelConfig
    dtypes: dict[str, int] | None  # elements of each dtype on disk
    num_bytes: int | None
    tensors: list[_Tensors]
    packed: dict[str, int] | None = None  # numbers in each packed form, such as "awq int4-g128"
    dtypes_by_part: dict[str, dict[str, int]] | None = None  # the same as `dtypes`, for each field of ParameterCounts


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL|PRESET", help="a folder, a hub name, or a preset")],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
    strict: Strict = False,
) -> None:
    """Print parameters by part, active parameters, dtypes, shapes, and what a sequence costs."""
    report = _describe(model)
    if as_json:
        print(json.dumps(_to_json(report), indent=2))
    else:
        _print(report)


def _describe(model: str) -> _Report:
    from qnext.config import PRESETS, preset

    if model in PRESETS and not Path(model).is_dir():
        from qnext.checkpoint.names import expected_tensors

        config = preset(model)
        return _Report(model, config, None, None, _distinct((*row, None) for row in expected_tensors(config).items()))
    from qnext.checkpoint.check import read_layout, structure_problems
    from qnext.checkpoint.header import read_index
    from qnext.checkpoint.resolve import resolve_model
    from qnext.errors import CorruptCheckpoint
    from qnext.planning.counts import part_of

    index = read_index(resolve_model(model))
    layout = read_layout(index.folder, index.tensors)
    for problem in structure_problems(layout, index.tensors, index.folder):
        raise CorruptCheckpoint(problem)
    dtypes: Counter[str] = Counter()
    by_part: dict[str, Counter[str]] = {}
    for info in index.tensors.values():
        dtypes[info.dtype] += prod(info.shape)
        part = "not used" if info.name in layout.passed_over else part_of(info.name)
        by_part.setdefault(part, Counter())[info.dtype] += prod(info.shape)
    num_bytes = sum(info.num_bytes for info in index.tensors.values())
    tensors = _distinct((info.name, info.shape, info.dtype) for info in index.tensors.values())
    packed: Counter[str] = Counter()
    for weight in layout.packed.values():
        packed[weight.form.describe()] += prod(weight.shape)
    stored = {part: dict(counts) for part, counts in by_part.items()}
    return _Report(model, layout.config, dict(dtypes), num_bytes, tensors, dict(packed) or None, stored)


def _distinct(rows: Iterable[tuple[str, tuple[int, ...], str | None]]) -> list[_Tensors]:
    """Numbers inside names become `*`."""
    counts: Counter[tuple[str, tuple[int, ...], str | None]] = Counter()
    for name, shape, dtype in rows:
        pattern = ".".join("*" if piece.isdigit() else piece for piece in name.split("."))
        counts[(pattern, shape, dtype)] += 1
    return [_Tensors(name, list(shape), dtype, count) for (name, shape, dtype), count in counts.items()]


def _to_json(report: _Report) -> dict[str, Any]:
    from qnext.config import to_hf
    from qnext.planning import count_active, count_parameters, kv_bytes_per_token, state_bytes_per_sequence

    config = report.config
    counts, active, state = count_parameters(config), count_active(config), state_bytes_per_sequence(config)
    return {
        "model": report.name,
        "config": to_hf(config),
        "parameters": {
            **asdict(counts), "total": counts.total, "trunk": counts.trunk,
            "active_without_head": active.without_head, "active_with_head": active.with_head,
        },
        "dtypes": report.dtypes,
        "dtypes_by_part": report.dtypes_by_part,
        "packed": report.packed,
        "bytes": report.num_bytes,
        "tensors": [asdict(row) for row in report.tensors],
        "kv_bytes_per_1000_tokens": 1000 * kv_bytes_per_token(config),
        "kv_bytes_per_1000_tokens_with_mtp": 1000 * kv_bytes_per_token(config, with_mtp=True),
        "state_bytes_per_sequence": {**asdict(state), "total": state.total},
    }  # fmt: skip


def _print(report: _Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from qnext.engine.memory import format_bytes

    values = _to_json(report)
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
    print(f"KV per 1,000 tokens {format_bytes(values['kv_bytes_per_1000_tokens'])} (bfloat16)")
    print(f"state per sequence {format_bytes(values['state_bytes_per_sequence']['total'])}")
    tensors = Table("tensor", "shape", "dtype", "count", box=None)
    for row in report.tensors:
        tensors.add_row(row.name, str(row.shape).replace("[", r"\["), row.dtype or "-", f"{row.count:,}")
    console.print(tensors)
