"""The width of numbers that must not be computed in a narrow dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
