"""Numbers of a checkpoint: are they finite, and what do FP8 blocks stand for?

Legend: O rows (out), I columns (in), b blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qnext.checkpoint.check import FP8_BLOCK, Layout
from qnext.checkpoint.files import TensorFiles
from qnext.checkpoint.header import TensorInfo
from qnext.checkpoint.names import scale_name

_CHUNK = 1 << 24
_LARGEST_E4M3 = 448.0


def tensor_value_problems(layout: Layout, files: TensorFiles, info: TensorInfo) -> Iterator[str]:
    """One line for each thing that is wrong with the numbers of one tensor."""
    tensor = files.read(info.name)
    if not is_finite(tensor):
        yield f"{info.file}: tensor {info.name} holds NaN or infinity"
    elif (
        layout.is_fp8 and info.name.endswith(scale_name("")) and not is_finite(tensor.to(torch.float32) * _LARGEST_E4M3)
    ):
        yield f"{info.file}: tensor {info.name} holds a scale beyond what FP8 weights can be multiplied by"
    is_tied_head = layout.config.tie_word_embeddings and info.name == "lm_head.weight"
    if is_tied_head and not torch.equal(tensor, files.read("model.embed_tokens.weight")):
        yield f"{info.file}: tensor lm_head.weight differs from the embedding, but config.json ties them"


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite, without a temporary as large as the tensor."""
    flat = tensor.detach().reshape(-1)
    if tensor.dtype == torch.float8_e4m3fn:
        # e4m3fn has no infinity; its NaN is all ones behind the sign.
        return not any(bool(((part & 0x7F) == 0x7F).any()) for part in flat.view(torch.uint8).split(_CHUNK))
    if not tensor.is_floating_point() or flat.numel() == 0:
        return True
    low, high = torch.aminmax(flat)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def dequantize(weight_OI: Tensor, scale_bb: Tensor, *, dtype: torch.dtype) -> Tensor:
    """weight * scale of its block, computed in fp32 and rounded once."""
    out_OI = torch.empty(weight_OI.shape, dtype=dtype)
    column_scales = scale_bb.to(torch.float32).repeat_interleave(FP8_BLOCK, dim=1)[:, : weight_OI.shape[1]]
    for b, start in enumerate(range(0, weight_OI.shape[0], FP8_BLOCK)):
        rows = slice(start, start + FP8_BLOCK)
        out_OI[rows] = weight_OI[rows].to(torch.float32) * column_scales[b]
    return out_OI
