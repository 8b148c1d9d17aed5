"""The gated delta rule, token by token and chunk-parallel.

Legend: T tokens, N sequences, H value heads, J key heads (H is a multiple of J), K and V key and value head dims,
B chunks of C tokens. Arithmetic in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops.packing import ChunkLayout, Packing

DELTA_CHUNK_SIZE = 64


class DeltaOutput(NamedTuple):
    o_THV: Tensor
    state_NHKV: Tensor


def gated_delta_rule(
    q_TJK: Tensor,
    k_TJK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
    chunk_size: int = DELTA_CHUNK_SIZE,
) -> DeltaOutput:
    """Per value head h with key head h // (H / J), from the initial state or zeros:

        S <- exp(g_t) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = S^T q_t / sqrt(K)

    q and k are L2-normalised by the caller; g <= 0 is the log decay, beta in [0, 1]. Runs token by token when every
    sequence has one token and chunk-parallel otherwise. Output in the dtype of v, state in fp32.
    """
    arguments = (q_TJK, k_TJK, v_THV, g_TH, beta_TH)
    if packing.max_length == 1:
        return recurrent_gated_delta_rule(*arguments, packing=packing, initial_state_NHKV=initial_state_NHKV)
    return chunk_gated_delta_rule(
        *arguments, packing=packing, initial_state_NHKV=initial_state_NHKV, chunk_size=chunk_size
    )


def recurrent_gated_delta_rule(
    q_TJK: Tensor,
    k_TJK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
) -> DeltaOutput:
    """The definition: one step after another, sequences side by side. See gated_delta_rule."""
    wide = torch.promote_types(v_THV.dtype, torch.float32)
    repeats = v_THV.shape[1] // k_TJK.shape[1]
    q_THK = q_TJK.to(wide).repeat_interleave(repeats, dim=1) * q_TJK.shape[-1] ** -0.5
    k_THK = k_TJK.to(wide).repeat_interleave(repeats, dim=1)
    v_wide, decay_TH, beta_wide = v_THV.to(wide), g_TH.to(wide).exp(), beta_TH.to(wide)
    state = _initial_state(initial_state_NHKV, k_THK, v_wide, packing)
    layout = packing.chunk_layout(1)
    tokens = torch.empty_like(layout.rows)
    tokens[layout.rows] = torch.arange(packing.num_tokens, device=tokens.device)
    state = state[layout.order]
    outputs = []
    for step in range(packing.max_length):
        rows = tokens[layout.starts[step] : layout.starts[step + 1]]
        k, v = k_THK[rows], v_wide[rows]
        active = state[: len(rows)] * decay_TH[rows][..., None, None]
        read = torch.einsum("nhkv,nhk->nhv", active, k)
        update = beta_wide[rows][..., None] * (v - read)
        active = active + k[..., None] * update[..., None, :]
        outputs.append(torch.einsum("nhkv,nhk->nhv", active, q_THK[rows]))
        state = torch.cat([active, state[len(rows) :]]) if len(rows) < len(state) else active
    o_THV = torch.cat(outputs)[layout.rows].to(v_THV.dtype)
    return DeltaOutput(o_THV, _unsorted(state, layout))


def chunk_gated_delta_rule(
    q_TJK: Tensor,
    k_TJK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
    chunk_size: int = DELTA_CHUNK_SIZE,
) -> DeltaOutput:
    """The same recurrence in chunks of C tokens on each sequence's own grid (arXiv 2412.06464, section 3.3).

    With G the running sum of g inside a chunk and D_ij = exp(G_i - G_j) for i >= j, the writes u of a chunk solve
    (I + strict_lower(beta_i (k_i . k_j) D_ij)) U = beta (V - exp(G) K S0). The solve does not depend on S0, so it is
    done for all chunks at once and only the state passes from chunk to chunk.
    """
    wide = torch.promote_types(v_THV.dtype, torch.float32)
    layout = packing.chunk_layout(chunk_size)
    num_key_heads, repeats = k_TJK.shape[1], v_THV.shape[1] // k_TJK.shape[1]
    q, k = (_to_chunks(x.to(wide), layout, chunk_size) for x in (q_TJK * q_TJK.shape[-1] ** -0.5, k_TJK))
    v = _to_chunks(v_THV.to(wide), layout, chunk_size)
    g, beta = (_to_chunks(x.to(wide)[..., None], layout, chunk_size).squeeze(-1) for x in (g_TH, beta_TH))

    cumulative = g.cumsum(-1)  # [B, H, C]
    decay = _decay_matrix(cumulative)  # [B, H, C, C]
    grouped = (len(v), num_key_heads, repeats, chunk_size, chunk_size)
    k_t = k.transpose(-1, -2)
    scores = ((q @ k_t)[:, :, None] * decay.view(grouped)).view(decay.shape)
    mixing = ((k @ k_t)[:, :, None] * decay.view(grouped)).view(decay.shape) * beta[..., None]

    def per_value_head(x: Tensor, factor: Tensor) -> Tensor:
        scaled = x[:, :, None] * factor.view(*grouped[:4], 1)
        return scaled.view(len(v), num_key_heads * repeats, chunk_size, -1)

    growth = cumulative.exp()
    value_dim = v.shape[-1]
    right = torch.cat([v * beta[..., None], per_value_head(k, beta * growth)], dim=-1)
    writes, reads = _SolveUnitLower.apply(mixing, right).split([value_dim, k.shape[-1]], dim=-1)
    q_in = per_value_head(q, growth)
    k_out = per_value_head(k, (cumulative[..., -1:] - cumulative).exp()).transpose(-1, -2)
    last_growth = growth[..., -1, None, None]

    state = _initial_state(initial_state_NHKV, k_out.transpose(-1, -2), v, packing)[layout.order]
    outputs = []
    for start, end in zip(layout.starts[:-1], layout.starts[1:], strict=True):
        active = state[: end - start]
        update = torch.baddbmm(
            writes[start:end].flatten(0, 1), reads[start:end].flatten(0, 1), active.flatten(0, 1), alpha=-1.0
        )
        inner = scores[start:end].flatten(0, 1) @ update
        outputs.append(torch.baddbmm(inner, q_in[start:end].flatten(0, 1), active.flatten(0, 1)))
        carried = (active * last_growth[start:end]).flatten(0, 1)
        advanced = torch.baddbmm(carried, k_out[start:end].flatten(0, 1), update).view_as(active)
        state = torch.cat([advanced, state[end - start :]]) if end - start < len(state) else advanced
    o = torch.cat(outputs).view(v.shape).transpose(1, 2).flatten(0, 1)
    return DeltaOutput(o.index_select(0, layout.rows).to(v_THV.dtype), _unsorted(state, layout))


def _to_chunks(x_THD: Tensor, layout: ChunkLayout, chunk_size: int) -> Tensor:
    """[T, H, D] -> [B, H, C, D] with zeros in the padding, which leave a state as it is."""
    rows = x_THD.new_zeros(layout.num_chunks * chunk_size, *x_THD.shape[1:]).index_copy(0, layout.rows, x_THD)
    return rows.view(layout.num_chunks, chunk_size, *x_THD.shape[1:]).transpose(1, 2).contiguous()


def _decay_matrix(cumulative: Tensor) -> Tensor:
    """exp(G_i - G_j) for i >= j, zero above: exponents are never positive, so nothing overflows."""
    size = cumulative.shape[-1]
    mask = torch.full((size, size), float("-inf"), dtype=cumulative.dtype, device=cumulative.device).triu(1)
    return (cumulative[..., :, None] - cumulative[..., None, :] + mask).exp()


class _SolveUnitLower(torch.autograd.Function):
    """X with (I + strict_lower(A)) X = R. Keeps the explicit inverse, so that backward is two products."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, right: Tensor) -> Tensor:
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        inverse = torch.linalg.solve_triangular(matrix, identity, upper=False, unitriangular=True)
        solution = inverse @ right
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        inverse, solution = ctx.saved_tensors
        grad_right = inverse.transpose(-1, -2) @ grad_out
        return (grad_right @ solution.transpose(-1, -2)).tril_(-1).neg_(), grad_right


def _initial_state(initial_state_NHKV: Tensor | None, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    if initial_state_NHKV is not None:
        return initial_state_NHKV.to(v.dtype)
    return v.new_zeros(packing.num_sequences, v.shape[1], k.shape[-1], v.shape[-1])


def _unsorted(state: Tensor, layout: ChunkLayout) -> Tensor:
    return torch.empty_like(state).index_copy(0, layout.order, state)
