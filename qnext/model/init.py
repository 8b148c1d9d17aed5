"""Random weights for training from scratch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from qnext.model.delta_net import GatedDeltaNet
from qnext.model.layers import GatedRMSNorm, RMSNorm
from qnext.model.moe import Experts, Router
from qnext.model.transformer import CausalLM

TimeConstants = Literal["log_uniform", "ones"]


@torch.no_grad()
def initialize(
    model: CausalLM, *, seed: int, time_constants: TimeConstants = "log_uniform", normalize_router: bool = True
) -> None:
    """Fill every parameter of `model` in place, the same values for the same seed on the same device.

    Matrices, embeddings and experts are normal with the config's `initializer_range`, norms have scale one, biases
    are zero. `time_constants`: see GatedDeltaNet.reset_time_constants. `normalize_router` gives every router row the
    same length, so that no expert is favoured before anything was learnt (Qwen's announcement says that router
    parameters are normalised at initialisation, not how).
    """
    std = model.config.initializer_range
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for module in model.modules():
            _initialize_module(module, std, time_constants, normalize_router)


def _initialize_module(module: nn.Module, std: float, time_constants: str, normalize_router: bool) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, (RMSNorm, GatedRMSNorm)):
        module.reset_parameters()
    elif isinstance(module, Experts):
        nn.init.normal_(module.gate_up_proj, std=std)
        nn.init.normal_(module.down_proj, std=std)
    elif isinstance(module, Router):
        nn.init.normal_(module.weight, std=std)
        if normalize_router:
            length = std * module.weight.shape[1] ** 0.5
            module.weight.mul_(length / module.weight.norm(dim=1, keepdim=True))
    elif isinstance(module, GatedDeltaNet):
        module.reset_time_constants(time_constants)
