"""Operations on rows that multiply with no matrix, by native kernels.

Legend: T tokens, D hidden, E experts, A experts per token, Y vocabulary, R rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LANES = 16
# The exponent's field, all ones: infinity, or no number.
_EXPONENTS = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def fits_rows(x: Tensor) -> bool:
    """Whether rows of this size are whole vectors."""
    return x.shape[-1] % _LANES == 0


def embed(native: Any, token_ids_T: Tensor, weight_YD: Tensor) -> Tensor:
    """[T, D] fp32 rows of an fp32 or bf16 table. Raises IndexError for a token that is none."""
    assert token_ids_T.dtype == torch.int64 and token_ids_T.dim() == 1 and weight_YD.is_contiguous()
    token_ids_T = token_ids_T.contiguous()
    num_entries, size = weight_YD.shape
    out_TD = torch.empty((token_ids_T.shape[0], size), dtype=torch.float32)
    native.embed(
        weight_YD.data_ptr(), weight_YD.dtype == torch.bfloat16, num_entries, size, token_ids_T.data_ptr(),
        token_ids_T.shape[0], out_TD.data_ptr(),
    )  # fmt: skip
    return out_TD


def rope_cos_sin(
    native: Any, positions_T: Tensor, frequencies: Tensor, *, attention_factor: float
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] fp32. See ops.rope_cos_sin."""
    assert positions_T.dtype == torch.int64 and frequencies.dtype == torch.float32
    positions_T, frequencies = positions_T.contiguous(), frequencies.contiguous()
    sizes = (positions_T.shape[0], frequencies.shape[0])
    cos, sin = torch.empty(sizes, dtype=torch.float32), torch.empty(sizes, dtype=torch.float32)
    native.rope(
        positions_T.data_ptr(), sizes[0], frequencies.data_ptr(), sizes[1], attention_factor, cos.data_ptr(),
        sin.data_ptr(),
    )  # fmt: skip
    return cos, sin


def put_rows(native: Any, rows_TD: Tensor, index_T: Tensor, table_ND: Tensor) -> None:
    """table[index] = rows, fp32. Raises IndexError for an index that is none."""
    assert index_T.dtype == torch.int64 and index_T.is_contiguous() and table_ND.is_contiguous()
    assert rows_TD.dtype == table_ND.dtype == torch.float32 and rows_TD.shape[1:] == table_ND.shape[1:]
    assert rows_TD.shape[0] == index_T.shape[0]
    rows_TD = rows_TD.contiguous()
    native.put_rows(
        rows_TD.data_ptr(), index_T.data_ptr(), rows_TD.shape[0], rows_TD.shape[1], table_ND.data_ptr(),
        table_ND.shape[0],
    )  # fmt: skip


def argmax(native: Any, rows_RY: Tensor, out_R: Tensor) -> None:
    """Where each fp32 row is highest, the lowest place of equal ones, into `out_R` int64."""
    assert out_R.dtype == torch.int64 and out_R.is_contiguous() and out_R.shape == rows_RY.shape[:1]
    rows_RY = rows_RY.contiguous()
    native.argmax(rows_RY.data_ptr(), rows_RY.shape[0], rows_RY.shape[1], out_R.data_ptr())


def concat(native: Any, a_TD: Tensor, b_TD: Tensor) -> Tensor:
    """[T, 2 * D]: two matrices of one shape side by side."""
    assert a_TD.shape == b_TD.shape and a_TD.dim() == 2
    a_TD, b_TD = a_TD.contiguous(), b_TD.contiguous()
    num_rows, size = a_TD.shape
    out = torch.empty((num_rows, 2 * size), dtype=torch.float32)
    native.concat(a_TD.data_ptr(), b_TD.data_ptr(), num_rows, size, out.data_ptr())
    return out


def rms_norm(native: Any, x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """Like ops.rms_norm for rows that fit and an fp32 weight."""
    x = x.contiguous()
    size = x.shape[-1]
    assert size == weight_D.shape[0] and fits_rows(x)
    out = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight_D.data_ptr(), x.numel() // size, size, eps, zero_centered, out.data_ptr())
    return out


def add(native: Any, a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape, for rows that fit."""
    assert a.shape == b.shape and fits_rows(a)
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    native.add(a.data_ptr(), b.data_ptr(), a.numel(), out.data_ptr())
    return out


def swiglu(native: Any, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape, for rows that fit."""
    assert gate.shape == up.shape and fits_rows(gate)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native.swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr())
    return out


def route(
    native: Any, logits_TE: Tensor, *, top_k: int, norm_topk_prob: bool, load_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights [T, A] fp32 and experts [T, A] int64. See ops.route."""
    num_tokens, num_experts = logits_TE.shape
    if not 0 < top_k <= num_experts:
        raise ValueError(f"cannot choose {top_k} of {num_experts} experts")
    if load_E is not None:
        assert load_E.shape == (num_experts,) and load_E.dtype == torch.int64
        assert load_E.is_contiguous() and load_E.device == logits_TE.device
    logits_TE = logits_TE.contiguous()
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32)
    chosen = torch.empty((num_tokens, top_k), dtype=torch.int64)
    native.route(
        logits_TE.data_ptr(), num_tokens, num_experts, top_k, norm_topk_prob, weights.data_ptr(), chosen.data_ptr(),
        0 if load_E is None else load_E.data_ptr(),
    )  # fmt: skip
    return weights, chosen


def fits_finite(x: Tensor) -> bool:
    """Whether the kernels look through these numbers."""
    return x.dtype in _EXPONENTS and x.is_contiguous()


def are_finite(native: Any, x: Tensor) -> bool:
    """See ops.are_finite."""
    finite: bool = native.are_finite(x.data_ptr(), x.numel(), 8 * x.itemsize, _EXPONENTS[x.dtype])
    return finite
