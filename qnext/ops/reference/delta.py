"""The gated delta rule. Legend: T tokens, N sequences, H value heads, J key heads, K and V key and value head dims."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaOutput
from qnext.ops.reference.width import wide


class DeltaStep(NamedTuple):
    """The change that one token makes."""

    o_HV: Tensor
    u_HV: Tensor  # is written along the key
    state_HKV: Tensor


def gated_delta_rule(inputs: DeltaInputs, *, packing: Packing, initial_state_NHKV: Tensor | None = None) -> DeltaOutput:
    """One token after another, from the initial states or zeros. The output has the dtype of v, the states are wide."""
    q_THK, k_THK, v_THV, g_TH, beta_TH = per_value_head(inputs)
    shape = (packing.num_sequences, v_THV.shape[1], k_THK.shape[2], v_THV.shape[2])
    states = v_THV.new_zeros(shape) if initial_state_NHKV is None else wide(initial_state_NHKV)
    outputs, last_states, t = [], [], 0
    for length, state_HKV in zip(packing.lengths, states, strict=True):
        for _ in range(length):
            o_HV, _, state_HKV = delta_step(state_HKV, q_THK[t], k_THK[t], v_THV[t], g_TH[t], beta_TH[t])
            outputs.append(o_HV)
            t += 1
        last_states.append(state_HKV)
    return DeltaOutput(torch.stack(outputs).to(inputs.v_THV.dtype), torch.stack(last_states))


def delta_step(S: Tensor, q_HK: Tensor, k_HK: Tensor, v_HV: Tensor, g_H: Tensor, beta_H: Tensor) -> DeltaStep:
    """S <- exp(g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T q / sqrt(K)"""
    S = g_H.exp()[:, None, None] * S
    u_HV = beta_H[:, None] * (v_HV - read(S, k_HK))
    S = S + k_HK[:, :, None] * u_HV[:, None, :]
    return DeltaStep(read(S, q_HK) * q_HK.shape[-1] ** -0.5, u_HV, S)


def read(S: Tensor, key_HK: Tensor) -> Tensor:
    """S^T k of every head."""
    return (S * key_HK[:, :, None]).sum(1)


def per_value_head(inputs: DeltaInputs) -> tuple[Tensor, ...]:
    """The inputs, wide; value head h reads key head h // (H / J)."""
    repeats = inputs.v_THV.shape[1] // inputs.k_TJK.shape[1]
    q_THK, k_THK = (x.repeat_interleave(repeats, dim=1) for x in inputs[:2])
    return tuple(wide(x) for x in (q_THK, k_THK, *inputs[2:]))
