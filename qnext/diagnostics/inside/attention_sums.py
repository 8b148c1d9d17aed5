"""Sums over the queries of one full-attention layer.

Legend: H query heads, B queries of a block, S keys, D bins of distances.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.probe import Attended

NUM_BINS = 24  # distances 0, 1, 2 to 3, 4 to 7, ... up to four million tokens


def first_of_bins(num_tokens: int) -> list[int]:
    """The smallest distance of each bin that a text of so many tokens needs."""
    starts = [0, *(2**power for power in range(NUM_BINS - 1))]
    return [start for start in starts if start < max(2, num_tokens)]


class AttentionSums:
    """Grows call after call: the sequence of each call is the same."""

    def __init__(self) -> None:
        self.num_queries = 0
        self.first_token_H = np.zeros(0)  # of all queries but the first
        self.entropy_H = np.zeros(0)
        self.distance_HD = np.zeros((0, NUM_BINS))
        self.received_S = np.zeros(0)  # mean over heads
        self.gate_H: NDArray[np.float64] | None = None
        self.closed_H: NDArray[np.float64] | None = None

    def add(self, attended: Attended, steps: Mapping[str, Tensor]) -> None:
        num_heads = attended.q_LHK.shape[1]
        if not self.num_queries:
            self.first_token_H, self.entropy_H = np.zeros(num_heads), np.zeros(num_heads)
            self.distance_HD = np.zeros((num_heads, NUM_BINS))
        self.num_queries += len(attended.q_LHK)
        received_S = torch.zeros(len(attended.k_SGK), device=attended.k_SGK.device)
        for block, p_HBS in attended.blocks():
            positions_B = attended.start + torch.arange(block.start, block.stop, device=p_HBS.device)
            self.first_token_H += _numbers(p_HBS[:, positions_B > 0, 0].sum(1))
            self.entropy_H += _numbers(torch.special.entr(p_HBS).sum((1, 2)))
            self.distance_HD += _numbers(_by_distance(p_HBS, positions_B))
            received_S += p_HBS.mean(0).sum(0)
        self.received_S = np.pad(self.received_S, (0, len(received_S) - len(self.received_S)))
        self.received_S += _numbers(received_S)
        if (gate_LHK := steps.get("gate")) is not None:
            open_LHK = torch.sigmoid(gate_LHK.float())
            sums = _numbers(open_LHK.mean(-1).sum(0)), _numbers((open_LHK < 0.1).float().mean(-1).sum(0))
            self.gate_H = sums[0] if self.gate_H is None else self.gate_H + sums[0]
            self.closed_H = sums[1] if self.closed_H is None else self.closed_H + sums[1]


def _by_distance(p_HBS: Tensor, positions_B: Tensor) -> Tensor:
    """[H, D]: the sum over queries of the probabilities of each bin of distances, by sums up to its far end."""
    up_to_HBS = p_HBS.cumsum(-1)
    shares, nearer = [], up_to_HBS[..., -1]
    for start in [2**power for power in range(NUM_BINS - 1)] + [None]:
        last_B = torch.full_like(positions_B, -1) if start is None else positions_B - start
        reached_HB = up_to_HBS.gather(-1, last_B.clamp(min=0).expand(len(p_HBS), -1)[..., None]).squeeze(-1)
        farther = torch.where(last_B >= 0, reached_HB, 0.0)  # what lies at this distance or beyond
        shares.append((nearer - farther).sum(1))
        nearer = farther
    return torch.stack(shares, 1)


def _numbers(x: Tensor) -> NDArray[np.float64]:
    return x.double().numpy(force=True)
