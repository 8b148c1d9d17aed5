"""A wrapper around any module of a model, and the same change made to the weights of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION
from qnext.model import CausalLM, Experts, Router, RouterOutput
from qnext.model.layers import MLP, Embedding, GatedRMSNorm, Linear, RMSNorm

from .models import PEER_CONFIGS

CONFIG = replace(
    PEER_CONFIGS["next, sizes of the native kernels"],
    layer_types=(LINEAR_ATTENTION, FULL_ATTENTION),
    num_nextn_predict_layers=1,
)
WRAPPED = (Linear, RMSNorm, GatedRMSNorm, Embedding, Router, Experts, MLP)


def factors(size: int) -> Tensor:
    """One for each output, so that no norm behind them takes them away."""
    return torch.linspace(0.5, 1.5, size) if size > 1 else torch.tensor([1.5])


class Multiplied(nn.Module):
    """What `inner` gives, each output times a factor of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.num_calls = 0

    def forward(self, *args: Any, load_E: Tensor | None = None, **others: Any) -> Any:
        self.num_calls += 1
        out = self.inner(*args)
        if not isinstance(self.inner, Router):
            return out * factors(out.shape[-1])
        logits_TE, router = out.logits_TE * factors(out.logits_TE.shape[-1]), self.inner
        routing = ops.route(logits_TE, top_k=router.top_k, norm_topk_prob=router.norm_topk_prob, load_E=load_E)
        return RouterOutput(logits_TE, routing)


def names_of(*kinds: type[nn.Module]) -> list[str]:
    with torch.device("meta"):
        return [name for name, module in CausalLM(CONFIG).named_modules() if isinstance(module, kinds)]


def wrap(model: CausalLM, name: str) -> Multiplied:
    wrapper = Multiplied(model.get_submodule(name))
    put(model, name, wrapper)
    return wrapper


def put(model: CausalLM, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


@torch.no_grad()
def multiply_weights(model: CausalLM, name: str) -> None:
    """What Multiplied does, done to the weights."""
    module = model.get_submodule(name)
    if isinstance(module, Experts):
        weight = module.down_proj
    else:
        weight = module.down_proj.weight if isinstance(module, MLP) else module.weight
    if isinstance(module, RMSNorm):
        offset = 1.0 if module.zero_centered else 0.0
        weight.copy_((weight + offset) * factors(len(weight)) - offset)
    elif isinstance(module, (GatedRMSNorm, Embedding)):
        weight.mul_(factors(weight.shape[-1]))
    else:
        weight.mul_(factors(weight.shape[-2])[:, None])
