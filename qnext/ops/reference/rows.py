"""Operations on rows. Legend: T tokens, D hidden, Y vocabulary, R and N rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def embedding(token_ids_T: Tensor, weight_YD: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """[T, D]: the rows of the tokens."""
    return torch.nn.functional.embedding(token_ids_T, weight_YD).to(dtype or weight_YD.dtype)


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def concat(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """[T, 2 * D]"""
    return torch.cat([a_TD, b_TD], dim=-1)


def put_rows(rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> None:
    """table[index] = rows, in place."""
    table_ND.index_copy_(0, index_T, rows_TD.to(table_ND.dtype))


def argmax(rows_RY: Tensor, out_R: Tensor) -> None:
    """The index of the highest number of each row, the lowest index of equal ones."""
    torch.argmax(rows_RY, dim=-1, out=out_R)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def are_finite(x: Tensor) -> bool:
    """Compares the least and the greatest number. A mask of all numbers would be a temporary as large as the tensor."""
    if not x.is_floating_point() or x.numel() == 0:
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(x))
