"""The gated delta rule, token by token and chunk-parallel.

Legend: T tokens, N sequences, H value heads, J key heads (H is a multiple of J), K and V key and value head dims,
B chunks of C tokens. Arithmetic in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qnext.ops.caches import DELTA_CHUNK_SIZE
from qnext.ops.packing import ChunkLayout, Packing
from qnext.ops.records import DeltaInputs, DeltaOutput

_SMALL_CHUNK_SIZE = 32  # less work for heads no wider than a chunk; divides the grid of the larger


def gated_delta_rule(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
) -> DeltaOutput:
    """Per value head h with key head h // (H / J), from the initial state or zeros:

        S <- exp(g_t) S;  u_t = beta_t (v_t - S^T k_t);  S <- S + k_t u_t^T;  o_t = S^T q_t / sqrt(K)

    q and k are L2-normalised by the caller; g <= 0 is the log decay, beta in [0, 1]. Runs token by token when every
    sequence has one token and chunk-parallel otherwise. Output in the dtype of v, state in fp32.
    """
    with torch.autocast(inputs.v_THV.device.type, enabled=False):  # it would round the state to bf16
        if packing.max_length == 1 and not torch.is_grad_enabled():
            return _single_step(inputs, _initial_state(initial_state_NHKV, inputs.k_TJK, inputs.v_THV, packing))
        if packing.max_length == 1:
            return recurrent_gated_delta_rule(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV)
        chunk_size = DELTA_CHUNK_SIZE if inputs.k_TJK.shape[-1] > DELTA_CHUNK_SIZE else _SMALL_CHUNK_SIZE
        return chunk_gated_delta_rule(
            inputs, packing=packing, initial_state_NHKV=initial_state_NHKV, chunk_size=chunk_size
        )


def _single_step(inputs: DeltaInputs, state_NHKV: Tensor) -> DeltaOutput:
    """One token of every sequence, for decoding: the state is copied once, with its decay, then written in place."""
    q_NJK, k_NJK, v_NHV, g_NH, beta_NH = inputs
    wide = torch.promote_types(v_NHV.dtype, torch.float32)
    repeats = v_NHV.shape[1] // k_NJK.shape[1]
    q = (q_NJK.to(wide) * q_NJK.shape[-1] ** -0.5).repeat_interleave(repeats, dim=1).flatten(0, 1)[:, None]
    k = k_NJK.to(wide).repeat_interleave(repeats, dim=1).flatten(0, 1)[:, None]
    state = (state_NHKV.to(wide) * g_NH.to(wide).exp()[..., None, None]).flatten(0, 1)
    update = (v_NHV.to(wide).flatten(0, 1)[:, None] - k @ state).mul_(beta_NH.to(wide).flatten()[:, None, None])
    state.baddbmm_(k.transpose(1, 2), update)
    out = (q @ state).view(v_NHV.shape)
    return DeltaOutput(out.to(v_NHV.dtype), state.view(state_NHKV.shape))


def recurrent_gated_delta_rule(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
) -> DeltaOutput:
    """The definition: one step after another, with the sequences side by side. See gated_delta_rule."""
    o_THV, _, state_NHKV = _walk(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV)
    return DeltaOutput(o_THV, state_NHKV)


def rounded_delta_rule(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    pieces: Sequence[Sequence[int]],
    state_NHKV: Tensor,
) -> DeltaOutput:
    """gated_delta_rule from narrow states, rounded to their dtype after every piece of each sequence."""
    o_THV, starts_N = torch.empty_like(inputs.v_THV), packing.cu_seqlens[:-1].clone()
    for step in range(max(map(len, pieces))):
        active = [n for n, lengths in enumerate(pieces) if step < len(lengths)]
        part = Packing([pieces[n][step] for n in active], device=packing.device)
        active_A = torch.tensor(active, device=packing.device)
        rows = starts_N[active_A][part.sequence_ids_T] + part.offsets_T
        chosen = DeltaInputs(*(x.index_select(0, rows) for x in inputs))
        out, state = gated_delta_rule(chosen, packing=part, initial_state_NHKV=state_NHKV[active_A])
        o_THV = o_THV.index_copy(0, rows, out)
        state_NHKV = state_NHKV.index_copy(0, active_A, state.to(state_NHKV.dtype))
        starts_N = starts_N.index_add(0, active_A, part.lengths_N)
    return DeltaOutput(o_THV, state_NHKV)


def delta_rule_updates(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor,
) -> Tensor:
    """u [T, H, V] of gated_delta_rule, wide: what each token adds to the state along its key.

    A narrow state is rounded to its dtype after every token.
    """
    stored = initial_state_NHKV.dtype
    return _walk(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV, stored=stored)[1]


def _walk(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None,
    stored: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, updates and last states of the recurrence; with `stored`, states rounded to it after every token."""
    q_TJK, k_TJK, v_THV, g_TH, beta_TH = inputs
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
    outputs, updates = [], []
    for step in range(packing.max_length):
        rows = tokens[layout.starts[step] : layout.starts[step + 1]]
        k, v = k_THK[rows], v_wide[rows]
        active = state[: len(rows)] * decay_TH[rows][..., None, None]
        read = torch.einsum("nhkv,nhk->nhv", active, k)
        update = beta_wide[rows][..., None] * (v - read)
        active = active + k[..., None] * update[..., None, :]
        updates.append(update)
        outputs.append(torch.einsum("nhkv,nhk->nhv", active, q_THK[rows]))
        if stored is not None:
            active = active.to(stored).to(state.dtype)
        state = torch.cat([active, state[len(rows) :]]) if len(rows) < len(state) else active
    o_THV = torch.cat(outputs)[layout.rows].to(v_THV.dtype)
    return o_THV, torch.cat(updates)[layout.rows], _unsorted(state, layout)


def chunk_gated_delta_rule(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
    chunk_size: int = DELTA_CHUNK_SIZE,
) -> DeltaOutput:
    """The same recurrence in chunks of C tokens on each sequence's own grid (arXiv 2412.06464, section 3.3).

    With G the running sum of g inside a chunk and D_ij = exp(G_i - G_j) for i >= j, the writes U of a chunk solve
    (I + A) U = beta (V - exp(G) K S0), where A_ij = beta_i (k_i . k_j) D_ij for i > j. The inverse does not depend
    on S0, so it is made for all chunks at once and only the state passes from chunk to chunk.
    """
    q_TJK, k_TJK, v_THV, g_TH, beta_TH = inputs
    wide = torch.promote_types(v_THV.dtype, torch.float32)
    layout = packing.chunk_layout(chunk_size)
    q, k, v = (_to_chunks(x.to(wide), packing, chunk_size) for x in (q_TJK, k_TJK, v_THV))
    g, beta = (_to_chunks(x.to(wide)[..., None], packing, chunk_size).squeeze(-1) for x in (g_TH, beta_TH))
    state = _initial_state(initial_state_NHKV, k, v, packing).index_select(0, layout.order)
    o, state = _ChunkDelta.apply(q, k, v, g, beta, state, layout.starts)
    return DeltaOutput(_from_chunks(o, packing, chunk_size).to(v_THV.dtype), _unsorted(state, layout))


class _ChunkDelta(torch.autograd.Function):
    """Chunked gated delta rule on [B, H, C, .] tensors in the order of ChunkLayout, with a hand-written backward.

    Per chunk, with P = (q k^T) * D, X = (I + A)^-1 and S the entry state:
        U = X (beta v - beta exp(G) k S);  o = exp(G) q S + P U;  S' = exp(G_C) S + (exp(G_C - G) k)^T U
    Only S -> S' is sequential, forward and, in reverse, for the gradients of U and S.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, starts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        q = q * q.shape[-1] ** -0.5
        repeats = v.shape[1] // k.shape[1]
        cumulative = g.cumsum(-1)
        growth, decay = cumulative.clamp(min=-87.0).exp(), _decay_matrix(cumulative)
        outflow = (cumulative[..., -1:] - cumulative).clamp_(min=-87.0).exp_()
        k_t = k.transpose(-1, -2)
        scores = _mul_grouped(decay, q @ k_t, repeats)
        mixing = _mul_grouped(decay, k @ k_t, repeats)
        identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand_as(mixing)
        inverse = torch.linalg.solve_triangular(mixing * beta[..., None], identity, upper=False, unitriangular=True)
        reads = inverse @ _mul_grouped((beta * growth)[..., None], k, repeats)
        q_in = _mul_grouped(growth[..., None], q, repeats)
        k_out = _mul_grouped(outflow[..., None], k, repeats)
        writes = inverse @ (v * beta[..., None])
        states = v.new_empty(*v.shape[:2], k.shape[-1], v.shape[-1])
        state = state.clone()
        for start, end in pairwise(starts):
            rows, active = slice(start, end), state[: end - start]
            states[rows] = active
            writes[rows] -= reads[rows] @ active
            active.mul_(growth[rows, :, -1:, None]).add_(k_out[rows].transpose(-1, -2) @ writes[rows])
        out = (q_in @ states).add_(scores @ writes)
        ctx.save_for_backward(
            q, k, v, beta, growth, outflow, decay, scores, mixing, inverse, reads, q_in, k_out, states, writes
        )
        ctx.starts = starts
        return out, state

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, beta, growth, outflow, decay, scores, mixing, inverse, reads, q_in, k_out, states, writes) = (
            ctx.saved_tensors
        )
        repeats = v.shape[1] // k.shape[1]
        grad_writes = scores.transpose(-1, -2) @ grad_out
        grad_states = q_in.transpose(-1, -2) @ grad_out  # of the entry states, completed in the loop
        grad_exits = torch.empty_like(states)
        grad_state = grad_state.clone()
        for start, end in zip(reversed(ctx.starts[:-1]), reversed(ctx.starts[1:]), strict=True):
            rows, active = slice(start, end), grad_state[: end - start]
            grad_exits[rows] = active
            grad_writes[rows] += k_out[rows] @ active
            active.mul_(growth[rows, :, -1:, None]).add_(grad_states[rows])
            active.sub_(reads[rows].transpose(-1, -2) @ grad_writes[rows])

        grad_right = inverse.transpose(-1, -2) @ grad_writes  # of beta (v - exp(G) k S)
        grad_matrix = (grad_right @ writes.transpose(-1, -2)).tril_(-1).neg_()
        grad_k_in = (grad_right @ states.transpose(-1, -2)).neg_()
        grad_q_in = grad_out @ states.transpose(-1, -2)
        grad_k_out = writes @ grad_exits.transpose(-1, -2)
        along_k_in = _dot_grouped(grad_k_in, k, repeats) * growth
        grad_beta = torch.linalg.vecdot(grad_right, v).add_(along_k_in).add_(torch.linalg.vecdot(grad_matrix, mixing))

        # The gradient of an exponent is that of the product it scales, times the product.
        grad_mixing = grad_matrix.mul_(beta[..., None])
        grad_scores = grad_out @ writes.transpose(-1, -2)
        flow = (grad_mixing * mixing).addcmul_(grad_scores, scores)
        along_k_out = _dot_grouped(grad_k_out, k, repeats).mul_(outflow)
        grad_cumulative = flow.sum(-1).sub_(flow.sum(-2)).addcmul_(along_k_in, beta).sub_(along_k_out)
        grad_cumulative += _dot_grouped(grad_q_in, q, repeats).mul_(growth)
        carried = (states * grad_exits).sum((-1, -2)) * growth[..., -1]
        grad_cumulative[..., -1] += carried + along_k_out.sum(-1)
        grad_g = grad_cumulative.flip(-1).cumsum(-1).flip(-1)

        grad_kk = _sum_groups(grad_mixing.mul_(decay), repeats)
        grad_qk = _sum_groups(grad_scores.mul_(decay), repeats)
        grad_q = (grad_qk @ k).add_(_sum_groups(grad_q_in.mul_(growth[..., None]), repeats))
        grad_k = (grad_kk + grad_kk.transpose(-1, -2)) @ k
        grad_k += grad_qk.transpose(-1, -2) @ q
        grad_k_in.mul_((beta * growth)[..., None]).addcmul_(grad_k_out, outflow[..., None])
        grad_k += _sum_groups(grad_k_in, repeats)
        grad_q *= q.shape[-1] ** -0.5
        return grad_q, grad_k, grad_right.mul_(beta[..., None]), grad_g, grad_beta, grad_state, None


def _mul_grouped(x: Tensor, y: Tensor, repeats: int) -> Tensor:
    """x [B, H, ...] times y [B, J, ...] of the key head that each value head uses."""
    grouped = x.view(x.shape[0], -1, repeats, *x.shape[2:]) * y[:, :, None]
    return grouped.view(*x.shape[:2], *grouped.shape[3:])


def _dot_grouped(x: Tensor, y: Tensor, repeats: int) -> Tensor:
    """Inner products over the last dim of x [B, H, C, K] with y [B, J, C, K] -> [B, H, C]."""
    return _mul_grouped(x, y, repeats).sum(-1)


def _sum_groups(x: Tensor, repeats: int) -> Tensor:
    """[B, H, ...] -> [B, J, ...]"""
    return x.view(x.shape[0], -1, repeats, *x.shape[2:]).sum(2) if repeats > 1 else x


def _decay_matrix(cumulative: Tensor) -> Tensor:
    """exp(G_i - G_j) for i >= j, zero above: exponents are never positive, so nothing overflows.

    Exponents are held above -87, where fp32 runs out of normal numbers: a decay of 1e-38 stands for zero. Infinite or
    subnormal operands would make the exponential ten times slower on CPUs.
    """
    return (cumulative[..., :, None] - cumulative[..., None, :]).clamp_(-87.0, 0.0).exp_().tril_()


def _to_chunks(x_THD: Tensor, packing: Packing, chunk_size: int) -> Tensor:
    """[T, H, D] -> [B, H, C, D] with zeros in the padding, which leave a state as it is."""
    layout = packing.chunk_layout(chunk_size)
    if packing.is_uniform and layout.is_full:
        rows = x_THD.unflatten(0, (packing.num_sequences, -1, chunk_size)).transpose(0, 1)
        return rows.transpose(2, 3).reshape(layout.num_chunks, x_THD.shape[1], chunk_size, -1)
    rows = x_THD.new_zeros(layout.num_chunks * chunk_size, *x_THD.shape[1:]).index_copy(0, layout.rows, x_THD)
    return rows.unflatten(0, (layout.num_chunks, chunk_size)).transpose(1, 2).contiguous()


def _from_chunks(x: Tensor, packing: Packing, chunk_size: int) -> Tensor:
    """[B, H, C, D] -> [T, H, D], the inverse of _to_chunks."""
    layout = packing.chunk_layout(chunk_size)
    if packing.is_uniform and layout.is_full:
        rows = x.unflatten(0, (-1, packing.num_sequences)).transpose(0, 1).transpose(2, 3)
        return rows.reshape(packing.num_tokens, x.shape[1], -1)
    return x.transpose(1, 2).flatten(0, 1).index_select(0, layout.rows)


def _initial_state(initial_state_NHKV: Tensor | None, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    if initial_state_NHKV is not None:
        return initial_state_NHKV.to(wide)
    return v.new_zeros(packing.num_sequences, v.shape[1], k.shape[-1], v.shape[-1], dtype=wide)


def _unsorted(state: Tensor, layout: ChunkLayout) -> Tensor:
    return torch.empty_like(state).index_copy(0, layout.order, state)
