"""Sums over the tokens of one Gated DeltaNet layer, and what the last tokens read out of its state.

Legend: T tokens of a call, W of the window, Q of the last ones, H value heads, J key heads, K and V head dims.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.ops import Packing
from qnext.probe import DeltaSeen, updates

WINDOW = 1024  # tokens whose part in the last reads is told apart
NUM_READERS = 16  # last tokens whose reads are taken apart


class Reads(NamedTuple):
    """The parts of what the last tokens read, |weight| |update| each, that came from every token of the window."""

    positions_W: NDArray[np.int64]
    readers_Q: NDArray[np.int64]  # positions
    shares_HQW: NDArray[np.float64]  # sum to one for each reader and head
    held_H: NDArray[np.float64]  # what is left at the last token of a state before the window


class DeltaSums:
    """Grows call after call: the sequence of each call is the same. `num_prompt` tokens come before those decoded."""

    def __init__(self, num_tokens: int, num_prompt: int) -> None:
        self._window_from, self._num_prompt = num_tokens - WINDOW, num_prompt
        self._decays: list[NDArray[np.float32]] = []
        self._kept: list[tuple[Tensor, ...]] = []  # positions, q, k, |u|, g
        self.num_tokens = 0
        self.beta_H = self.gate_H = np.zeros(())
        self.read_H = self.decoded_read_H = np.zeros(())
        self.num_decoded = 0
        self.state_HKV: Tensor | None = None

    def add(self, positions_T: Tensor, seen: DeltaSeen) -> None:
        inputs, steps = seen.inputs, seen.steps
        self.num_tokens += len(positions_T)
        self._decays.append(inputs.g_TH.float().numpy(force=True))
        self.beta_H = self.beta_H + _numbers(inputs.beta_TH.sum(0))
        self.gate_H = self.gate_H + _numbers(torch.sigmoid(steps["gate"].float()).mean(-1).sum(0))
        reads_TH = steps["core_out"].float().norm(dim=-1) * inputs.q_TJK.shape[-1] ** 0.5
        is_decoded_T = positions_T >= self._num_prompt
        self.read_H = self.read_H + _numbers(reads_TH[~is_decoded_T].sum(0))
        self.decoded_read_H = self.decoded_read_H + _numbers(reads_TH[is_decoded_T].sum(0))
        self.num_decoded += int(is_decoded_T.sum())
        if seen.after_NHKV is not None:
            self.state_HKV = seen.after_NHKV[0].float().clone()
        if int(positions_T[-1]) >= self._window_from:
            u_THV = updates(inputs, Packing([len(positions_T)], device=positions_T.device), seen.before_NHKV)
            kept = (positions_T, inputs.q_TJK, inputs.k_TJK, u_THV.norm(dim=-1), inputs.g_TH)
            self._kept.append(tuple(x[-WINDOW:].clone() for x in kept))

    def half_lives(self) -> NDArray[np.float64]:
        """[T, H]: tokens after which half of a state is left, if each token were like this one."""
        return np.log(2.0) / np.maximum(-np.concatenate(self._decays).astype(np.float64), 1e-9)

    def effective_ranks(self) -> NDArray[np.float64]:
        """[H]: exp of the entropy of the squared singular values of the last state, 1 to min(K, V)."""
        assert self.state_HKV is not None
        energy_HR = torch.linalg.svdvals(self.state_HKV).double().square()
        share_HR = energy_HR / energy_HR.sum(-1, keepdim=True).clamp(min=1e-300)
        return _numbers(torch.special.entr(share_HR).sum(-1).exp())

    def reads(self) -> Reads:
        """o = S^T q is the sum over earlier tokens s of exp(G - G_s) (q k_s) u_s, where G adds up g."""
        positions, q_WJK, k_WJK, u_WH, g_WH = (
            torch.cat(each)[-WINDOW:].float() for each in zip(*self._kept, strict=True)
        )
        repeats = u_WH.shape[1] // k_WJK.shape[1]
        readers = slice(max(0, len(positions) - NUM_READERS), len(positions))
        products_JQW = torch.einsum("qjk,wjk->jqw", q_WJK[readers], k_WJK)
        total_WH = g_WH.double().cumsum(0)
        fading_HQW = (total_WH[readers, None] - total_WH[None]).permute(2, 0, 1)
        is_later_QW = positions[None] > positions[readers, None]
        weights_HQW = fading_HQW.masked_fill(is_later_QW, -torch.inf).exp() * u_WH.double().T[:, None]
        parts_HQW = products_JQW.repeat_interleave(repeats, dim=0).abs().double() * weights_HQW
        shares_HQW = parts_HQW / parts_HQW.sum(-1, keepdim=True).clamp(min=1e-300)
        where = positions.long().numpy(force=True)
        return Reads(where, where[readers], _numbers(shares_HQW), _numbers(total_WH[-1].exp()))


def _numbers(x: Tensor) -> NDArray[np.float64]:
    return x.double().numpy(force=True)
