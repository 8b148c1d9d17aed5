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
    role = layout.roles.get(info.name)
    if role is not None:
        packed = layout.packed[role.weight]
        problem = packed_problem(packed, role.kind, files, info, check_finite=check_finite)
        if problem is not None:
            yield f"{info.file}: tensor {info.name} {problem}"
    if role is not None or not check_finite or info.name in layout.packing.passed_over:
        return
    if not is_finite_on_disk(files, info.name):
        yield f"{info.file}: tensor {info.name} holds NaN or infinity"
    is_tied_head = layout.config.tie_word_embeddings and info.name == "lm_head.weight"
    if is_tied_head and not _are_equal(files, info.name, "model.embed_tokens.weight"):
        yield f"{info.file}: tensor lm_head.weight differs from the embedding, but config.json ties them"


def _are_equal(files: TensorFiles, name: str, other: str) -> bool:
    infos = files.tensors[name], files.tensors[other]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    return all(torch.equal(*pieces) for pieces in zip(*map(files.pieces, (name, other)), strict=True))


def read_weight(layout: Layout, files: TensorFiles, name: str, *, dtype: torch.dtype) -> Tensor:
    """The numbers of one weight in `dtype`, however it is stored; a view of the file where nothing changes."""
    if name in layout.packed:
        return read_packed_numbers(layout.packed[name], files, dtype=dtype)
    return files.read(name).to(dtype)
