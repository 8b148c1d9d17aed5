"""The formulas of the losses: cross entropy of the head, balance of the experts, size of the router's logits.

Legend: T tokens, R rows, D hidden, Y vocabulary, L routers, E experts, A experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qnext import ops
from qnext.model import CausalLM, RouterOutput, SparseMoE
from qnext.model.layers import fusable
from qnext.training.data import IGNORED


def head_loss_sum(model: CausalLM, hidden_RD: Tensor, labels_R: Tensor) -> Tensor:
    """ops.cross_entropy_sum for the logits of a model. A head that has to be called is called: see fusable."""
    head = fusable(model.lm_head)
    if isinstance(head, Tensor):
        return ops.cross_entropy_sum(hidden_RD, head, labels_R)
    return -label_log_probs(model, hidden_RD, labels_R).sum()


def label_log_probs(model: CausalLM, hidden_RD: Tensor, labels_R: Tensor) -> Tensor:
    """[R] log softmax(logits)[label] in fp32 at least, 0 for rows with the label -100.

    The logits of about a million numbers exist at a time; they are computed again for the gradient.
    """
    return by_chunks(_called_log_probs, model, hidden_RD, labels_R)


def by_chunks(formula: Callable[..., Tensor], model: CausalLM, hidden_RD: Tensor, *targets: Tensor) -> Tensor:
    """`formula(model, hidden, *targets)`, a value for each row, on as many rows at a time as have a million logits.

    Nothing of a chunk but its values is kept for the gradient.
    """
    size = ops.rows_of_logits(model.config.vocab_size)
    chunks = zip(*(tensor.split(size) for tensor in (hidden_RD, *targets)), strict=True)
    # Nothing random is drawn, and two threads that ask torch for its generator's state at once can block each other.
    parts = [checkpoint(formula, model, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(parts)


def _called_log_probs(model: CausalLM, hidden_RD: Tensor, labels_R: Tensor) -> Tensor:
    logits_RY = wide_logits(model, hidden_RD)
    return -F.cross_entropy(logits_RY, labels_R, ignore_index=IGNORED, reduction="none")


def wide_logits(model: CausalLM, hidden_RD: Tensor) -> Tensor:
    """The logits of a model in fp32 at least."""
    logits_RY = model.logits(hidden_RD)
    return logits_RY.to(torch.promote_types(logits_RY.dtype, torch.float32))


class RouterTap:
    """Records what every router of a model decided in forward passes with gradients, or in all, in the order of the
    layers."""

    def __init__(self, model: nn.Module, *, without_gradient: bool = False) -> None:
        self._takes_all = without_gradient
        self._outputs: dict[int, list[RouterOutput]] = {}
        layers = [module for module in model.modules() if isinstance(module, SparseMoE)]
        self._handles = [layer.gate.register_forward_hook(self._keep) for layer in layers]

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: RouterOutput) -> None:
        # A forward pass within a backward one computes a layer again (checkpoint_activations): nothing is decided anew.
        is_again = torch._C._current_graph_task_id() != -1
        if not is_again and (self._takes_all or torch.is_grad_enabled()):
            self._outputs.setdefault(threading.get_ident(), []).append(output)

    def take(self) -> list[RouterOutput]:
        """The decisions in the calling thread's forward passes since its last call."""
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
    """[L, E]: how many tokens each expert of each router got."""
    num_routers = len(outputs)
    chosen = torch.stack([output.routing.experts_TA.flatten() for output in outputs])
    chosen = chosen + torch.arange(num_routers, device=chosen.device)[:, None] * num_experts
    return torch.bincount(chosen.flatten(), minlength=num_routers * num_experts).view(num_routers, num_experts)


def balance_loss(probs_LTE: Tensor, counts_LE: Tensor) -> Tensor:
    """Load balance: the mean over routers of E * sum_i f_i P_i. It is 1 when perfectly balanced (Megatron's scale).

    f_i is the share of the assignments in `counts_LE` that went to expert i; it has no gradient. P_i is the mean
    probability of expert i in `probs_LTE`. Hugging Face's value of the same routing is top_k times larger. A model of L
    layers in Megatron has the sum over layers, L times larger. With the counts of the whole optimiser step, the mean of
    this loss over the micro batches is the loss of the whole step, however the step is cut (arXiv 2501.11873). The loop
    counts as it goes: a micro batch sees its own counts and those of the batches that ended before it began.
    """
    share_LE = counts_LE.to(probs_LTE.dtype) / counts_LE.sum(-1, keepdim=True)
    return (share_LE * probs_LTE.mean(1)).sum(-1).mean() * counts_LE.shape[-1]


def router_losses(logits_LTE: Tensor, counts_LE: Tensor) -> tuple[Tensor, Tensor]:
    """(balance_loss, z-loss). The z-loss is the mean over tokens and routers of logsumexp(logits)^2."""
    normaliser_LT = logits_LTE.logsumexp(-1)
    probs_LTE = (logits_LTE - normaliser_LT[..., None]).exp()
    return balance_loss(probs_LTE, counts_LE), normaliser_LT.square().mean()
