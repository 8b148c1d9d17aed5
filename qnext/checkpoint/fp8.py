"""The official FP8 form: e4m3 weights with one scale per block of 128 x 128, which multiplies.

Legend: O rows (out), I columns (in), b blocks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qnext.checkpoint.header import load_json
from qnext.errors import ConfigError

BLOCK = 128
SCALE_DTYPES = ("F32", "BF16")


def read_is_fp8(folder: Path) -> bool:
    """Whether config.json declares the official FP8 form; ConfigError names any other quantization."""
    path = folder / "config.json"
    block = load_json(path.read_bytes(), path).get("quantization_config")
    if block is None:
        return False
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: quantization_config: must be an object or null")
    method = block.get("quant_method")
    if method != "fp8":
        raise ConfigError(f"{path}: quantization_config.quant_method: {method!r} is not supported, only 'fp8'")
    for key, allowed in (
        ("fmt", ("e4m3", None)), ("activation_scheme", ("dynamic", None)), ("weight_block_size", ([BLOCK, BLOCK],)),
    ):  # fmt: skip
        if block.get(key) not in allowed:
            raise ConfigError(
                f"{path}: quantization_config.{key}: {block.get(key)!r} is not supported, only {allowed[0]!r}"
            )
    return True


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the block scales of an [O, I] weight."""
    out_dim, in_dim = shape
    return -(-out_dim // BLOCK), -(-in_dim // BLOCK)


def dequantize(weight_OI: Tensor, scale_bb: Tensor, *, dtype: torch.dtype) -> Tensor:
    """weight * scale of its block, computed in fp32 and rounded once."""
    out_OI = torch.empty(weight_OI.shape, dtype=dtype)
    column_scales = scale_bb.to(torch.float32).repeat_interleave(BLOCK, dim=1)[:, : weight_OI.shape[1]]
    for b, start in enumerate(range(0, weight_OI.shape[0], BLOCK)):
        rows = slice(start, start + BLOCK)
        out_OI[rows] = weight_OI[rows].to(torch.float32) * column_scales[b]
    return out_OI
