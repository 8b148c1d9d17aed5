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
from qnext.planning import Kind, ParameterInfo, list_parameters
from qnext.planning.parameters import NORMS

TimeConstants = Literal["log_uniform", "ones"]
_CHUNK, _PIECE, _SIXTEEN = 1 << 22, 1 << 16, 16
_MAX_A = 16.0


@torch.no_grad()
def initialize(
    model: CausalLM, *, seed: int, time_constants: TimeConstants = "log_uniform", normalize_router: bool = True
) -> None:
    """Fill every parameter of `model` in place, the same values for the same seed on the same device.

    See initial_values for the rules.
    """
    infos = list_parameters(model.config)
    for name, parameter in model.named_parameters():
        info = infos[name]
        for expert, part in enumerate(parameter) if info.expert_axis is not None else ((None, parameter),):
            values = initial_values(
                model.config,
                info,
                seed=seed,
                expert=expert,
                dtype=part.dtype,
                device=part.device,
                time_constants=time_constants,
                normalize_router=normalize_router,
            )
            part.copy_(values)


def initial_values(
    config: ModelConfig,
    info: ParameterInfo,
    *,
    seed: int,
    expert: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    time_constants: TimeConstants = "log_uniform",
    normalize_router: bool = True,
) -> Tensor:
    """Initial values of a parameter, or of the block of `expert` in a stacked parameter.

    Matrices, embeddings and experts are normal with the config's `initializer_range`; norms have scale one; biases are
    zero. `normalize_router` gives every router row the same length, so that no expert is favoured before anything was
    learnt (Qwen's announcement says that router parameters are normalised at initialisation, not how). `time_constants`
    is the rule for dt_bias: with "log_uniform" heads remember from a few to thousands of tokens, as in Mamba-2; "ones"
    is 1, as in transformers.
    """
    assert (info.expert_axis is None) == (expert is None), info.name
    shape = info.block_shape
    constant = _constant(config, info.kind, time_constants)
    if constant is not None:
        return torch.full(shape, constant, dtype=dtype, device=device)
    generator = generator_of(f"{seed}/{info.name}/{expert}", device)
    if info.kind is Kind.A_LOG:
        return torch.empty(shape, device=device).uniform_(1e-3, _MAX_A, generator=generator).log_().to(dtype)
    if info.kind is Kind.DT_BIAS:  # softplus^-1(dt), dt log-uniform in [1e-3, 0.1]
        dt = torch.empty(shape, device=device).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        return (dt + torch.log(-torch.expm1(-dt))).to(dtype)
    values = torch.empty(shape, dtype=dtype, device=device)
    fill_normal(values, std=config.initializer_range, generator=generator)
    if info.kind is Kind.ROUTER and normalize_router:
        wide = values.to(torch.float32)
        length = config.initializer_range * shape[1] ** 0.5
        values = (wide * (length / wide.norm(dim=1, keepdim=True))).to(dtype)
    return values


def generator_of(text: str, device: torch.device | str) -> torch.Generator:
    """Random numbers that are a function of a text."""
    generator = torch.Generator(device=device)
    return generator.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)


def fill_normal(values: Tensor, *, std: float, generator: torch.Generator) -> None:
    """Fill a contiguous tensor of any float with normal numbers, drawn in fp32 in chunks of 4M.

    On the CPU a chunk is drawn in pieces that stay in a cache, twice as fast. torch draws numbers in sixteens, and the
    last, incomplete sixteen in its own way, so the pieces give the numbers of the whole chunk.
    """
    for chunk in values.view(-1).split(_CHUNK):
        pieces = list(chunk.split(_PIECE)) if values.device.type == "cpu" else [chunk]
        if len(pieces) > 1 and len(pieces[-1]) < _SIXTEEN:
            pieces[-2:] = [chunk[-len(pieces[-1]) - _PIECE :]]
        for piece in pieces:
            piece.copy_(torch.empty(piece.shape, device=values.device).normal_(std=std, generator=generator))


def _constant(config: ModelConfig, kind: Kind, time_constants: TimeConstants) -> float | None:
    """The one value of a parameter that is not random."""
    if kind is Kind.BIAS:
        return 0.0
    if kind is Kind.DELTA_NORM:
        return 1.0
    if kind in NORMS:
        return 0.0 if config.zero_centered_norm else 1.0
    if kind is Kind.DT_BIAS and time_constants == "ones":
        return 1.0
    return None


def fill_uniform(values: Tensor, *, bound: float, generator: torch.Generator) -> None:
    """Fill with uniform numbers between -bound and bound, drawn in fp32 on the device of the tensor."""
    values.copy_(torch.empty(values.shape, device=values.device).uniform_(-bound, bound, generator=generator))
