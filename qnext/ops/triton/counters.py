"""Numbers by which the programs of one start know which of them is the last, and does what needs all of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NUM_COUNTERS = 1 << 17  # of a start at most


@cache
def counters(device: torch.device) -> Tensor:
    """Zeros, int32. Whoever is the last leaves zeros again, for the next start of the stream: there is one on a device.

    They are made when they are first asked for, and so before a graph is captured.
    """
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
