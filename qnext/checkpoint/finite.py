"""Whether numbers are finite. The check goes in pieces, without a temporary as large as the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.checkpoint.files import TensorFiles
from qnext.ops import are_finite

_CHUNK = 1 << 24
# Behind the sign: e4m3fn has no infinity and one NaN; e5m2 has both where its exponent is full; e8m0 has no sign.
_NO_NUMBER = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e5m2: (0x7C, 0x7C), torch.float8_e8m0fnu: (0xFF, 0xFF)}


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite."""
    if tensor.dtype in _NO_NUMBER:
        mask, value = _NO_NUMBER[tensor.dtype]
        flat = tensor.detach().reshape(-1)
        return not any(bool(((part & mask) == value).any()) for part in flat.view(torch.uint8).split(_CHUNK))
    return are_finite(tensor)


def is_finite_on_disk(files: TensorFiles, name: str) -> bool:
    return all(is_finite(piece) for piece in files.pieces(name))
