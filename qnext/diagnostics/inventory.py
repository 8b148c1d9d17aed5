"""The parts of a model, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.config import ModelConfig


@dataclass(frozen=True)
class DistinctTensors:
    """Distinct tensors. Layers and experts with the same name, shape and dtype are one row."""

    name: str
    shape: list[int]
    dtype: str | None
    count: int


@dataclass(frozen=True)
class ModelInventory:
    """The parts of a folder or a preset. Values of a disk are None for a preset."""

    name: str
    config: ModelConfig
    dtypes: dict[str, int] | None  # elements of each dtype on disk
    num_bytes: int | None
    tensors: list[DistinctTensors]
    packed: dict[str, int] | None = None  # numbers in each packed form, such as "awq int4-g128"
    dtypes_by_part: dict[str, dict[str, int]] | None = None  # the same as `dtypes`, for each field of ParameterCounts
    model: str | None = None  # the short name of config and weights, which the audit log of a server has
    provenance: dict[str, Any] | None = None


def take_inventory(model: str) -> ModelInventory:
    """The inventory of a preset, a folder or a hub name, from headers alone. Raises ModelNotFound,
    CorruptCheckpoint."""
    from qnext.config import PRESETS, preset

    if model in PRESETS and not Path(model).is_dir():
        from qnext.checkpoint.names import expected_tensors

        config = preset(model)
        tensors = _distinct((*row, None) for row in expected_tensors(config).items())
        return ModelInventory(model, config, None, None, tensors)
    from qnext.checkpoint.check import read_layout, structure_problems
    from qnext.checkpoint.identity import identity_of
    from qnext.checkpoint.provenance import read_provenance
    from qnext.checkpoint.resolve import resolve_model
    from qnext.errors import CorruptCheckpoint

    layout = read_layout(resolve_model(model)).with_all_experts()
    index = layout.index
    for problem in structure_problems(layout):
        raise CorruptCheckpoint(problem)
    dtypes: Counter[str] = Counter()
    by_part: dict[str, Counter[str]] = {}
    for info in index.tensors.values():
        dtypes[info.dtype] += prod(info.shape)
        part = layout.part_of(info.name) or "not used"
        by_part.setdefault(part, Counter())[info.dtype] += prod(info.shape)
    tensors = _distinct((info.name, info.shape, info.dtype) for info in index.tensors.values())
    packed: Counter[str] = Counter()
    for weight in layout.packed.values():
        packed[weight.form.describe()] += prod(weight.shape)
    stored = {part: dict(counts) for part, counts in by_part.items()}
    return ModelInventory(
        model,
        layout.config,
        dict(dtypes),
        layout.num_bytes,
        tensors,
        dict(packed) or None,
        stored,
        identity_of(layout).model,
        read_provenance(index.folder),
    )


def _distinct(rows: Iterable[tuple[str, tuple[int, ...], str | None]]) -> list[DistinctTensors]:
    """Numbers inside names become `*`."""
    counts: Counter[tuple[str, tuple[int, ...], str | None]] = Counter()
    for name, shape, dtype in rows:
        pattern = ".".join("*" if piece.isdigit() else piece for piece in name.split("."))
        counts[(pattern, shape, dtype)] += 1
    return [DistinctTensors(name, list(shape), dtype, count) for (name, shape, dtype), count in counts.items()]


def inventory_document(report: ModelInventory) -> dict[str, Any]:
    """A JSON document for programs, with counts and the memory of a sequence."""
    from qnext.config import to_hf
    from qnext.planning import count_active, count_parameters, kv_bytes_per_token, state_bytes_per_sequence

    config = report.config
    counts, active, state = count_parameters(config), count_active(config), state_bytes_per_sequence(config)
    return {
        "model": report.name,
        "config": to_hf(config),
        "parameters": {
            **asdict(counts),
            "total": counts.total,
            "trunk": counts.trunk,
            "active_without_head": active.without_head,
            "active_with_head": active.with_head,
        },
        "dtypes": report.dtypes,
        "dtypes_by_part": report.dtypes_by_part,
        "packed": report.packed,
        "bytes": report.num_bytes,
        "tensors": [asdict(row) for row in report.tensors],
        "kv_bytes_per_1000_tokens": 1000 * kv_bytes_per_token(config),
        "kv_bytes_per_1000_tokens_with_mtp": 1000 * kv_bytes_per_token(config, with_mtp=True),
        "state_bytes_per_sequence": {**asdict(state), "total": state.total},
        "fingerprint": report.model,
        "provenance": report.provenance,
    }
