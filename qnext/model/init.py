"""Random weights for training from scratch. Every value is a function of seed and parameter name alone.

A parameter can therefore be made without the model around it, and a stacked expert without its neighbours.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from qnext.config import ModelConfig
from qnext.model.transformer import CausalLM

TimeConstants = Literal["log_uniform", "ones"]
_CHUNK = 1 << 22
_MAX_A = 16.0


@torch.no_grad()
def initialize(
    model: CausalLM, *, seed: int, time_constants: TimeConstants = "log_uniform", normalize_router: bool = True
) -> None:
    """Fill every parameter of `model` in place, the same values for the same seed on the same device.

    See initial_values for the rules.
    """
    for name, parameter in model.named_parameters():
        parts = enumerate(parameter) if is_stacked(name) else ((None, parameter),)
        for expert, part in parts:
            values = initial_values(
                model.config, name, tuple(part.shape), seed=seed, expert=expert, dtype=part.dtype, device=part.device,
                time_constants=time_constants, normalize_router=normalize_router,
            )  # fmt: skip
            part.copy_(values)


def is_stacked(name: str) -> bool:
    """Whether the parameter holds one block per expert, each with its own random stream."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def initial_values(
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    *,
    seed: int,
    expert: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    time_constants: TimeConstants = "log_uniform",
    normalize_router: bool = True,
) -> Tensor:
    """Initial values of the parameter `name`, or of the block of `expert` in a stacked one.

    Matrices, embeddings and experts are normal with the config's `initializer_range`, norms have scale one, biases
    are zero. `normalize_router` gives every router row the same length, so that no expert is favoured before
    anything was learnt (Qwen's announcement says that router parameters are normalised at initialisation, not how).
    `time_constants` is the rule for dt_bias, the initial decay of Gated DeltaNet: "log_uniform" is softplus^-1(dt)
    with dt log-uniform in [1e-3, 0.1], so that heads remember from a few to thousands of tokens (Mamba-2,
    flash-linear-attention); "ones" is 1, as transformers does. A is uniform in (0, 16) for both.
    """
    assert is_stacked(name) == (expert is not None), name
    constant = _constant(config, name, time_constants)
    if constant is not None:
        return torch.full(shape, constant, dtype=dtype, device=device)
    generator = torch.Generator(device=device)
    digest = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith(".A_log"):
        return torch.empty(shape, device=device).uniform_(1e-3, _MAX_A, generator=generator).log_().to(dtype)
    if name.endswith(".dt_bias"):
        dt = torch.empty(shape, device=device).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        return (dt + torch.log(-torch.expm1(-dt))).to(dtype)
    values = torch.empty(shape, dtype=dtype, device=device)
    for chunk in values.view(-1).split(_CHUNK):
        wide = torch.empty(chunk.shape, device=device)
        chunk.copy_(wide.normal_(std=config.initializer_range, generator=generator))
    if name.endswith(".mlp.gate.weight") and normalize_router:
        wide = values.to(torch.float32)
        length = config.initializer_range * shape[1] ** 0.5
        values = (wide * (length / wide.norm(dim=1, keepdim=True))).to(dtype)
    return values


def _constant(config: ModelConfig, name: str, time_constants: TimeConstants) -> float | None:
    """The one value of a parameter that is not random."""
    if name.endswith(".bias"):
        return 0.0
    if name.endswith(".linear_attn.norm.weight"):
        return 1.0
    module = name.rsplit(".", 2)[-2]
    if "norm" in module:
        return 0.0 if config.zero_centered_norm else 1.0
    if name.endswith(".dt_bias") and time_constants == "ones":
        return 1.0
    return None
