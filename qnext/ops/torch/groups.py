"""Assignments of tokens to experts, sorted by expert, and products of their rows.

Legend: T tokens, D and F widths of rows, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_halves(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up for a last dim that holds gate, then up."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class Groups(NamedTuple):
    """Assignments sorted by expert."""

    tokens_A: Tensor  # the token of each sorted row
    experts_A: Tensor  # the expert of each sorted row
    places_TA: Tensor  # [T, top_k] the sorted row of each assignment
    ends_E: Tensor  # int32, where each expert's rows end


def group(experts_TA: Tensor, num_experts: int) -> Groups:
    experts_A, order_A = experts_TA.flatten().sort(stable=True)
    tokens_A = torch.div(order_A, experts_TA.shape[1], rounding_mode="floor")
    places_A = torch.empty_like(order_A).index_copy_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    # Not by counting, for which a GPU would be waited for.
    numbers_E = torch.arange(num_experts, device=experts_A.device)
    ends_E = torch.searchsorted(experts_A, numbers_E, right=True, out_int32=True)
    return Groups(tokens_A, experts_A, places_A.view_as(experts_TA), ends_E)


def sum_per_token(rows_AD: Tensor, groups: Groups) -> Tensor:
    """[A, D] sorted rows -> [T, D], each token's rows summed."""
    return F.embedding_bag(groups.places_TA, rows_AD, mode="sum")


def _fits_grouped_mm(*tensors: Tensor) -> bool:
    """torch's grouped product takes fp32 and bf16 whose rows are multiples of 16 bytes."""
    return all(
        t.dtype in (torch.float32, torch.bfloat16) and all(size * t.element_size() % 16 == 0 for size in t.shape[1:])
        for t in tensors
    )


def grouped_mm(x_AD: Tensor, weight_EDF: Tensor, groups: Groups) -> Tensor:
    """Rows of x, sorted by expert, times the matrix of their expert: [A, D] x [E, D, F] -> [A, F]."""
    if _fits_grouped_mm(x_AD, weight_EDF):
        return F.grouped_mm(x_AD, weight_EDF, offs=groups.ends_E)
    rows_A, capacity = _padded_rows(groups)
    padded = _pad_groups(x_AD, rows_A, len(weight_EDF), capacity) @ weight_EDF
    return padded.flatten(0, 1).index_select(0, rows_A)


def grouped_outer(x_AD: Tensor, y_AF: Tensor, groups: Groups) -> Tensor:
    """Per expert x^T y over its rows: [A, D], [A, F] -> [E, D, F]; zero for experts without rows."""
    if _fits_grouped_mm(x_AD, y_AF):
        return F.grouped_mm(x_AD.t(), y_AF, offs=groups.ends_E)
    rows_A, capacity = _padded_rows(groups)
    x, y = (_pad_groups(rows, rows_A, len(groups.ends_E), capacity) for rows in (x_AD, y_AF))
    return x.transpose(1, 2) @ y


def _padded_rows(groups: Groups) -> tuple[Tensor, int]:
    counts_E = groups.ends_E.diff(prepend=groups.ends_E.new_zeros(1))
    capacity = int(counts_E.max())
    starts_A = (groups.ends_E - counts_E).index_select(0, groups.experts_A)
    places_A = torch.arange(len(groups.experts_A), device=starts_A.device) - starts_A
    return groups.experts_A * capacity + places_A, capacity


def _pad_groups(x_AD: Tensor, rows_A: Tensor, num_experts: int, capacity: int) -> Tensor:
    padded = x_AD.new_zeros(num_experts * capacity, x_AD.shape[1]).index_copy(0, rows_A, x_AD)
    return padded.view(num_experts, capacity, x_AD.shape[1])
