"""Rotary positions on the leading dims of each head, with static YaRN.

Legend: T tokens, H heads, K head dim, R rotated dims (R <= K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qnext.ops.records import Rope


def rope_frequencies(rotary_dim: int, *, theta: float) -> Tensor:
    """[R / 2] inverse frequencies theta^(-2i / R), fp32 on the CPU."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    return 1.0 / (theta**exponents)


def yarn_frequencies(
    rotary_dim: int,
    *,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    attention_factor: float | None,
    truncate: bool,
) -> tuple[Tensor, float]:
    """Inverse frequencies stretched by YaRN, and the factor for cos and sin (arXiv 2309.00071).

    Frequencies that turn more than `beta_fast` times over `original_length` stay. Those that turn less than `beta_slow`
    times are divided by `factor`. Between them is a linear ramp. With rotary_dim 64, theta 1e7 and 262,144 tokens the
    ramp runs from index 14 to 22.
    """

    def index_of(num_turns: float) -> float:
        return rotary_dim * math.log(original_length / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    plain = rope_frequencies(rotary_dim, theta=theta)
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0.0, 1.0)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return plain / factor * ramp + plain * (1.0 - ramp), attention_factor


def rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> Rope:
    """cos and sin, each [T, R / 2] fp32, of the angles position * frequency, times `attention_factor`.

    Angles are exact products of position and fp32 frequency.
    """
    # In fp32 the product of a million with a frequency below 1 would be wrong by up to 0.03.
    angles = positions_T[:, None].to(torch.float64) * frequencies[None, :].to(torch.float64)
    cos, sin = ((x * attention_factor).to(torch.float32) for x in (angles.cos(), angles.sin()))
    return Rope(cos, sin)


def apply_rope(x_THK: Tensor, rope: Rope) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R dims; the others pass through unchanged."""
    half = rope.cos.shape[-1]
    first, second, rest = x_THK.split([half, half, x_THK.shape[-1] - 2 * half], dim=-1)
    cos, sin = (x[:, None, :].to(x_THK.dtype) for x in rope)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*rotated, rest) if rest.shape[-1] else rotated, dim=-1)
