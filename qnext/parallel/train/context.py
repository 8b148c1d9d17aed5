"""A micro batch whose rows are cut among ranks: states go from rank to rank, keys and values to all.

Legend: T rows of the micro batch, R rows of this rank, D hidden, C conv channels, W conv width, H heads, G KV heads,
K and V head dims, N sequences of this rank, Q rows whose keys the rows here may see, X any shape.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from qnext import ops
from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, DecoderLayer
from qnext.model.attention import Attention
from qnext.model.delta_net import GatedDeltaNet

_CONV, _STATE = 1, 2  # tags of messages


class RowContext:
    """The ranks of `group` have the rows of one micro batch in their order, as equally many as can be. `cut` says which
    batch; before it, nothing is cut."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.num_ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.whole: Batch | None = None
        self.sizes: list[int] = []  # rows of each rank
        self.first = 0  # row whose sequence goes on here, and what the rows here may see from it on
        self.is_seen_RQ: Tensor | None = None

    def span(self, num_rows: int) -> tuple[int, int]:
        """The rows of this rank."""
        return self._spans(num_rows)[self.rank]

    def _spans(self, num_rows: int) -> list[tuple[int, int]]:
        if num_rows < self.num_ranks:
            raise UsageError(f"--context-parallel {self.num_ranks}: a micro batch has {num_rows} rows")
        ends = [num_rows * rank // self.num_ranks for rank in range(self.num_ranks + 1)]
        return list(pairwise(ends))

    def cut(self, whole: Batch) -> Batch:
        """The rows of this rank. Its sequences may begin or end on other ranks; mixers know it from now on."""
        of_ranks = self._spans(len(whole.token_ids_T))
        self.sizes = [end - start for start, end in of_ranks]
        start, end = of_ranks[self.rank]
        ends = list(accumulate(whole.packing.lengths))
        spans = zip([0, *ends], ends, strict=False)
        lengths = [min(last, end) - max(first, start) for first, last in spans if first < end and last > start]
        self.whole = whole
        self.first = start - int(whole.positions_T[start])
        ids_T, rows_T = whole.packing.sequence_ids_T, torch.arange(end, device=whole.token_ids_T.device)
        is_same_RQ = ids_T[start:end, None] == ids_T[None, self.first : end]
        self.is_seen_RQ = is_same_RQ & (rows_T[start:, None] >= rows_T[None, self.first :])
        packing = ops.Packing(lengths, device=whole.token_ids_T.device)
        return Batch(whole.token_ids_T[start:end], whole.positions_T[start:end], packing)

    def neighbour(self, step: int) -> int | None:
        """The rank so many places away."""
        place = self.rank + step
        return dist.get_global_rank(self.group, place) if 0 <= place < self.num_ranks else None


def check_context(num_parts: int, *, num_ranks: int) -> None:
    """Raises UsageError where micro batches cannot be cut among so many ranks of all."""
    if num_parts < 1 or num_ranks % num_parts:
        raise UsageError(f"--context-parallel {num_parts}: it must divide the {num_ranks} ranks of the run")


def put_into_context(model: CausalLM, context: RowContext) -> None:
    """Let the mixers of `model` ask other ranks for what stands before their rows."""
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            mixer: Any = module.linear_attn if module.is_linear else module.self_attn
            mixer.__class__ = DeltaInContext if module.is_linear else AttentionInContext  # with its parameters
            mixer.context = context


class DeltaInContext(GatedDeltaNet):
    """Its first sequence goes on from the states of convolution and delta rule of the rank before."""

    context: RowContext

    def forward(self, x_RD: Tensor, batch: Batch) -> Tensor:
        if self.context.whole is None:
            return super().forward(x_RD, batch)
        qkvz_RX, ba_RX = self.in_proj_qkvz(x_RD), self.in_proj_ba(x_RD)
        sizes = {"key_head_dim": self.key_head_dim, "num_heads": self.num_value_heads}
        qkv_RC, z_RHV = ops.split_qkvz(qkvz_RX, num_key_heads=self.num_key_heads, **sizes)
        beta_RH, g_RH = ops.delta_gates(ba_RX, self.A_log, self.dt_bias, num_key_heads=self.num_key_heads)
        conv_NWC = self._carried(qkv_RC, (self.conv1d.kernel_size[0] - 1, qkv_RC.shape[1]), batch, _CONV)
        mixed_RC, conv_NWC = self.conv1d(qkv_RC, batch.packing, conv_NWC)
        token = _SendState.apply(conv_NWC[-1], self.context, _CONV)
        q_RJK, k_RJK, v_RHV = self._heads(mixed_RC)
        inputs = ops.DeltaInputs(ops.l2_norm(q_RJK), ops.l2_norm(k_RJK), v_RHV, g_RH, beta_RH)
        wide = v_RHV.to(torch.promote_types(v_RHV.dtype, torch.float32))
        state_NHKV = self._carried(wide, (self.num_value_heads, self.key_head_dim, v_RHV.shape[2]), batch, _STATE)
        o_RHV, state_NHKV = ops.gated_delta_rule(inputs, packing=batch.packing, initial_state_NHKV=state_NHKV)
        token = token + _SendState.apply(state_NHKV[-1], self.context, _STATE)
        return self.out_proj(self.norm(o_RHV, z_RHV).flatten(1)) + token.to(x_RD.dtype)

    def _carried(self, like: Tensor, shape: tuple[int, ...], batch: Batch, tag: int) -> Tensor:
        """[N, ...]: the states that the sequences here begin with."""
        fresh = like.new_zeros(batch.packing.num_sequences, *shape)
        before = _ReceiveState.apply(like.new_zeros(shape, requires_grad=torch.is_grad_enabled()), self.context, tag)
        goes_on = (batch.positions_T[0] > 0).to(like.dtype)
        return torch.cat([(before * goes_on)[None], fresh[1:]])


class AttentionInContext(Attention):
    """Has the keys and values of all ranks."""

    context: RowContext

    def forward(self, x_RD: Tensor, batch: Batch, rope: ops.Rope) -> Tensor:
        if self.context.whole is None:
            return super().forward(x_RD, batch, rope)
        q_RHK, gate_RHK = self._queries_and_gates(self.q_proj(x_RD))
        k_RGK, v_RGK = (x.unflatten(1, (-1, self.head_dim)) for x in (self.k_proj(x_RD), self.v_proj(x_RD)))
        q_RHK, k_RGK = ops.apply_rope(self.q_norm(q_RHK), rope), ops.apply_rope(self.k_norm(k_RGK), rope)
        k_TGK, v_TGK = (_GatherRows.apply(x, self.context) for x in (k_RGK, v_RGK))
        is_seen_RQ, first = self.context.is_seen_RQ, self.context.first
        assert is_seen_RQ is not None
        seen = slice(first, first + is_seen_RQ.shape[1])
        q, k, v = (x.transpose(0, 1)[None] for x in (q_RHK, k_TGK[seen], v_TGK[seen]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen_RQ, scale=self.scale, enable_gqa=True)
        out_RHK = out[0].transpose(0, 1)
        if gate_RHK is not None:
            out_RHK = out_RHK * torch.sigmoid(gate_RHK)
        return self.o_proj(out_RHK.flatten(1))


class _SendState(torch.autograd.Function):
    """A state to the next rank; zero, which the result of the layer has to be added to. Its gradient comes back."""

    @staticmethod
    def forward(ctx: Any, state_X: Tensor, context: RowContext, tag: int) -> Tensor:
        ctx.context, ctx.tag, ctx.like = context, tag, torch.empty_like(state_X, device="meta")
        following = context.neighbour(1)
        if following is not None:
            dist.send(state_X.contiguous(), following, tag=tag)
        return state_X.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_X = torch.zeros(ctx.like.shape, dtype=ctx.like.dtype, device=grad.device)
        following = ctx.context.neighbour(1)
        if following is not None:
            dist.recv(grad_X, following, tag=ctx.tag)
        return grad_X, None, None


class _ReceiveState(torch.autograd.Function):
    """The state of the rank before; zeros on the first. Its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, zeros_X: Tensor, context: RowContext, tag: int) -> Tensor:
        ctx.context, ctx.tag = context, tag
        state_X = zeros_X.detach().clone()
        before = context.neighbour(-1)
        if before is not None:
            dist.recv(state_X, before, tag=tag)
        return state_X

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[None, None, None]:
        before = ctx.context.neighbour(-1)
        if before is not None:
            dist.send(grad_X.contiguous(), before, tag=ctx.tag)
        return None, None, None


class _GatherRows(torch.autograd.Function):
    """The rows of all ranks; the gradients of all ranks are added for those of this one."""

    @staticmethod
    def forward(ctx: Any, x_RX: Tensor, context: RowContext) -> Tensor:
        ctx.context, ctx.sizes = context, context.sizes
        largest = max(ctx.sizes)
        padded_RX = torch.cat([x_RX, x_RX.new_zeros(largest - len(x_RX), *x_RX.shape[1:])])
        parts = [torch.empty_like(padded_RX) for _ in ctx.sizes]
        dist.all_gather(parts, padded_RX, group=context.group)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_TX: Tensor) -> tuple[Tensor, None]:
        context, own = ctx.context, ctx.sizes[ctx.context.rank]
        parts_RX = grad_TX.new_empty(context.num_ranks * own, *grad_TX.shape[1:])
        dist.all_to_all_single(
            parts_RX, grad_TX.contiguous(), [own] * context.num_ranks, ctx.sizes, group=context.group
        )
        return parts_RX.unflatten(0, (context.num_ranks, -1)).sum(0), None
