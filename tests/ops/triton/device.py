"""Where the kernels run in these tests, and how they are compared: with the reference in fp64 on the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
# Of fp32 arithmetic. A GPU knows exponentials to 2e-7, and multiplies three TF32 parts of each number.
TOLERANCE = 2e-5 if DEVICE.type == "cpu" else 1e-4
# Of results that are rounded to bf16 once, against rounded ones. The interpreter does not round: it cuts off digits.
TOLERANCE_BF16 = 1e-2 if DEVICE.type == "cpu" else 2e-3


def here(tree: Any) -> Any:
    """Its tensors on the device of the tests."""
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, tree)


def exact(tree: Any) -> Any:
    """Its tensors on the CPU, floating ones in fp64."""
    return tree_map(lambda x: (x.double() if x.is_floating_point() else x).cpu() if isinstance(x, Tensor) else x, tree)
