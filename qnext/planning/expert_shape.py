"""How evenly the experts of a layer are used: one definition for metrics, reports and training.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ExpertShape(NamedTuple):
    """float64 [L] each. A layer without any token counts as balanced.

    `entropy_L` is the entropy over its largest possible value ln E. `balance_L` is the mean count over the highest
    count. Both are 1 where all experts have the same load. `top_share_L` is the share of the busiest hundredth of the
    experts, at least one expert. `num_dead_L`, int64, counts experts without a token.
    """

    entropy_L: NDArray[np.float64]
    balance_L: NDArray[np.float64]
    top_share_L: NDArray[np.float64]
    num_dead_L: NDArray[np.int64]


def expert_shape(counts_LE: NDArray[np.int64]) -> ExpertShape:
    """The shape of the counts of tokens per expert.

    >>> expert_shape(np.array([[4, 4, 4, 4], [0, 16, 0, 0]])).balance_L.tolist()
    [1.0, 0.25]
    """
    num_experts = counts_LE.shape[1]
    num_top = math.ceil(num_experts / 100)
    sum_L = counts_LE.sum(axis=1)
    is_used_L = sum_L > 0
    share_LE = counts_LE / np.maximum(sum_L, 1)[:, None]
    logs_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    entropy_L = np.abs((share_LE * logs_LE).sum(axis=1)) / math.log(max(2, num_experts))
    most_L = counts_LE.max(axis=1, initial=0)
    top_L = np.partition(counts_LE, num_experts - num_top, axis=1)[:, num_experts - num_top :].sum(axis=1)
    return ExpertShape(
        entropy_L=np.where(is_used_L & (num_experts > 1), entropy_L.clip(max=1), 1.0),
        balance_L=np.where(is_used_L, counts_LE.mean(axis=1) / np.maximum(most_L, 1), 1.0),
        top_share_L=np.where(is_used_L, top_L / np.maximum(sum_L, 1), num_top / num_experts),
        num_dead_L=(counts_LE == 0).sum(axis=1),
    )
