"""Losses of a training step: next token, token after next, balance of the experts, size of the router's logits.

Legend: T tokens, R rows, D hidden, Y vocabulary, L routers, E experts, A experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qnext.model import CausalLM, Router, RouterOutput
from qnext.training.data import IGNORED, TrainBatch

_CHUNK_ELEMENTS = 1 << 20


def cross_entropy_sum(hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, *, chunk_rows: int = 0) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight^T)[label]; rows labelled -100 count nothing.

    Logits exist for `chunk_rows` rows at a time (0: about a million logits), in fp32 at least. The gradients of
    both inputs are computed together with the value.
    """
    if chunk_rows <= 0:
        chunk_rows = max(64, _CHUNK_ELEMENTS // weight_YD.shape[0])
    return _CrossEntropySum.apply(hidden_RD, weight_YD, labels_R, chunk_rows)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_YD: Tensor, labels_R: Tensor, chunk_rows: int) -> Tensor:
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_RD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_YD, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden_RD.device)
        for start in range(0, len(labels_R), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden, labels = hidden_RD[rows], labels_R[rows]
            is_valid = labels != IGNORED
            targets = labels.clamp_min(0)[:, None]
            log_probs = (hidden @ weight_YD.t()).to(wide).log_softmax(-1)
            total -= log_probs.gather(1, targets).squeeze(1).masked_fill(~is_valid, 0.0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=wide))
            grad_logits.mul_(is_valid[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_YD
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden
        ctx.grad_hidden, ctx.grad_weight, ctx.weight_dtype = grad_hidden, grad_weight, weight_YD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


class RouterTap:
    """Keeps what every router of a model decided in forwards with gradients, in the order of the layers."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[int, list[RouterOutput]] = {}
        self._handles = [
            module.register_forward_hook(self._keep) for module in model.modules() if isinstance(module, Router)
        ]

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: RouterOutput) -> None:
        if torch.is_grad_enabled():
            self._outputs.setdefault(threading.get_ident(), []).append(output)

    def take(self) -> list[RouterOutput]:
        """What the calling thread's forwards left since its last call."""
        return self._outputs.pop(threading.get_ident(), [])

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def stack_logits(outputs: Sequence[RouterOutput]) -> Tensor:
    """[L, T, E] in fp32 at least."""
    logits_LTE = torch.stack([output.logits_TE for output in outputs])
    return logits_LTE.to(torch.promote_types(logits_LTE.dtype, torch.float32))


@torch.no_grad()
def expert_counts(outputs: Sequence[RouterOutput], *, num_experts: int) -> Tensor:
    """[L, E] how many tokens each expert of each router was given."""
    num_routers = len(outputs)
    chosen = torch.stack([output.routing.experts_TA.flatten() for output in outputs])
    chosen = chosen + torch.arange(num_routers, device=chosen.device)[:, None] * num_experts
    return torch.bincount(chosen.flatten(), minlength=num_routers * num_experts).view(num_routers, num_experts)


def balance_loss(probs_LTE: Tensor, counts_LE: Tensor) -> Tensor:
    """Load balance, mean over routers of E * sum_i f_i P_i: 1 when perfectly balanced (Megatron's scale).

    f_i is the share of the assignments in `counts_LE` that went to expert i and carries no gradient; P_i is the mean
    probability of expert i in `probs_LTE`. Hugging Face's value of the same routing is top_k times larger; a model
    of L layers in Megatron has the sum over layers, L times larger. Counts of the whole optimiser step make the loss
    independent of how the step is cut into micro batches (arXiv 2501.11873): the mean over micro batches of this
    loss, each with the same `counts_LE`, is the loss of the whole.
    """
    share_LE = counts_LE.to(probs_LTE.dtype) / counts_LE.sum(-1, keepdim=True)
    return (share_LE * probs_LTE.mean(1)).sum(-1).mean() * counts_LE.shape[-1]


def router_losses(logits_LTE: Tensor, counts_LE: Tensor) -> tuple[Tensor, Tensor]:
    """(balance_loss, z-loss): the z-loss is the mean over tokens and routers of logsumexp(logits)^2."""
    normaliser_LT = logits_LTE.logsumexp(-1)
    probs_LTE = (logits_LTE - normaliser_LT[..., None]).exp()
    return balance_loss(probs_LTE, counts_LE), normaliser_LT.square().mean()


class BalanceBuffer:
    """Expert counts of the optimiser step so far: what f of balance_loss is computed from.

    A micro batch sees its own counts and those of the batches that ended before it began: with one after another the
    last sees the whole step, and with one micro batch per step this is exact. It is emptied at every step, so nothing
    of it outlives a snapshot.
    """

    def __init__(self) -> None:
        self.counts_LE: Tensor | None = None

    def add(self, counts_LE: Tensor) -> Tensor:
        """Counts so far, `counts_LE` included."""
        if self.counts_LE is None:
            self.counts_LE = counts_LE
        else:
            self.counts_LE = self.counts_LE + counts_LE
        return self.counts_LE

    def fork(self) -> BalanceBuffer:
        """A buffer for one of several micro batches that run at once: it sees what was counted before them."""
        child = BalanceBuffer()
        child.counts_LE = self.counts_LE
        return child

    def join(self, children: Sequence[BalanceBuffer]) -> None:
        """Take over what forks of this buffer have added."""
        before = self.counts_LE
        for child in children:
            if child.counts_LE is not None:
                self.add(child.counts_LE if before is None else child.counts_LE - before)

    def reset(self) -> None:
        self.counts_LE = None


class StepTargets(NamedTuple):
    """What the losses of one optimiser step are divided by."""

    num_labels: int
    num_mtp_labels: int
    num_micro_batches: int


class LossWeights(NamedTuple):
    balance: float
    z: float
    mtp: float  # 0: the MTP module does not run
    detach_trunk: bool
    mtp_steps: int = 1


class Losses(NamedTuple):
    """This micro batch's part of the step's losses: `total` has the gradient, the others are detached scalars."""

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    z: Tensor


def compute_losses(
    model: CausalLM, batch: TrainBatch, *, tap: RouterTap, buffer: BalanceBuffer, targets: StepTargets,
    weights: LossWeights,
) -> Losses:  # fmt: skip
    """Forward of one micro batch. Summed over the micro batches of a step, each loss is the mean over the step.

    MTP targets lie two tokens ahead and are masked where the document ends before. With several MTP steps its loss is
    their mean, and the routers' losses see the first of them.
    """
    trunk = model(batch.batch)
    head_YD = model.lm_head.weight
    main = cross_entropy_sum(trunk.hidden_TD, head_YD, batch.labels_T) / max(1, targets.num_labels)
    zero = torch.zeros_like(main.detach())
    total, mtp, balance, z = main, zero, zero, zero
    outputs: list[RouterOutput] | None = None
    if weights.mtp > 0.0 and model.mtp is not None:
        if weights.detach_trunk:
            trunk = type(trunk)(*(tensor.detach() for tensor in trunk))
        source_TD = model.draft_source(trunk)
        for draft_TD in _drafts(model, source_TD, batch, num_steps=weights.mtp_steps):
            outputs = tap.take() if outputs is None else outputs
            mtp = mtp + cross_entropy_sum(draft_TD, head_YD, batch.mtp_labels_T)
        tap.take()  # of the later steps
        mtp = mtp / (weights.mtp_steps * max(1, targets.num_mtp_labels))
        total = total + weights.mtp * mtp
    outputs = tap.take() if outputs is None else outputs
    if outputs:
        counts_LE = expert_counts(outputs, num_experts=model.config.num_experts)
        balance, z = router_losses(stack_logits(outputs), buffer.add(counts_LE))
        balance, z = balance / targets.num_micro_batches, z / targets.num_micro_batches
        total = total + weights.balance * balance + weights.z * z
    return Losses(total, main.detach(), mtp.detach(), balance.detach(), z.detach())


def _drafts(model: CausalLM, source_TD: Tensor, batch: TrainBatch, *, num_steps: int) -> Iterator[Tensor]:
    """[T, D] of each step: the MTP module's result for every row.

    From the second step on a row reads, for the trunk's row, what the module made one place before, as it will when it
    drafts one token after another; the first row of a document has none before it and reads the trunk's again.
    """
    is_first_T1 = (batch.batch.positions_T == 0)[:, None]
    rows_TD = source_TD
    for _ in range(num_steps):
        draft_TD = model.draft_step(batch.next_ids_T, rows_TD, batch.batch)
        yield draft_TD
        rows_TD = torch.where(is_first_T1, source_TD, draft_TD.roll(1, dims=0))
