"""Numbers of a checkpoint: are they sound, and what do they stand for?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qnext.checkpoint.check import Layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.finite import is_finite_on_disk
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.packed_values import packed_problem, read_packed_numbers


def tensor_value_problems(
    layout: Layout, files: TensorFiles, info: TensorInfo, *, check_finite: bool = True
) -> Iterator[str]:
    """One line for each thing that is wrong with the numbers of one tensor.

    Without `check_finite` only those of packed weights that would change what others stand for.
    """
    if info.name in layout.passed_over:
        return
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
