"""The numbers of a checkpoint: checking them, and computing what they stand for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qnext.checkpoint.check import Layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.finite import is_finite, is_finite_on_disk
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.packed_values import packed_problem, read_packed, read_packed_numbers
from qnext.checkpoint.record_values import record_problem
from qnext.errors import CorruptCheckpoint
from qnext.ops import QuantizedWeight


def tensor_value_problems(
    layout: Layout, files: TensorFiles, info: TensorInfo, *, check_finite: bool = True
) -> Iterator[str]:
    """One line for each fault in the numbers of one tensor.

    Without `check_finite` it reports only faults in packed weights that would change what other numbers stand for.
    """
    if info.name in layout.passed_over:
        return
    problem = record_problem(layout.records, files, info) if layout.records else None
    if problem is not None:
        yield problem
    role = layout.roles.get(info.name)
    if role is not None:
        packed = layout.packed[role.weight]
        problem = packed_problem(packed, role.kind, files, info, check_finite=check_finite)
        if problem is not None:
            yield f"{info.file}: tensor {info.name} {problem}"
    if role is not None or not check_finite:
        return
    if not is_finite_on_disk(files, info.name):
        yield not_finite(info)


def not_finite(info: TensorInfo) -> str:
    return f"{info.file}: tensor {info.name} holds NaN or infinity"


def read_weight(layout: Layout, files: TensorFiles, name: str, *, dtype: torch.dtype) -> Tensor:
    """The numbers of one weight in `dtype`, however it is stored."""
    if name in layout.packed:
        return read_packed_numbers(layout.packed[name], files, dtype=dtype)
    return files.read(name).to(dtype)


def read_sound_codes(layout: Layout, files: TensorFiles, name: str) -> QuantizedWeight:
    """The codes of a weight that is packed in integers, its inputs in order. Raises CorruptCheckpoint likewise."""
    _check_stored(layout, files, name)
    return read_packed(layout.packed[name], files)


def _check_stored(layout: Layout, files: TensorFiles, name: str) -> None:
    for stored in layout.stored_names(name):
        for problem in tensor_value_problems(layout, files, files.tensors[stored]):
            raise CorruptCheckpoint(problem)


def read_sound_weight(layout: Layout, files: TensorFiles, name: str, *, dtype: torch.dtype) -> Tensor:
    """The same. Raises CorruptCheckpoint naming file and tensor for numbers that are not sound."""
    if name in layout.packed or layout.records:
        _check_stored(layout, files, name)
        return read_weight(layout, files, name, dtype=dtype)
    damage = record_problem(layout.records, files, files.tensors[name]) if layout.records else None
    if damage is not None:
        raise CorruptCheckpoint(damage)
    values = files.read(name)
    if not is_finite(values):
        raise CorruptCheckpoint(not_finite(files.tensors[name]))
    return values.to(dtype)
