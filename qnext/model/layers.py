"""Small parts that every family shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig


class RMSNorm(nn.Module):
    """RMSNorm whose scale is 1 + weight (Qwen3-Next) or weight (Qwen3), as `zero_centered` says."""

    def __init__(self, size: int, *, eps: float, zero_centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.zero_centered = zero_centered

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps, zero_centered=self.zero_centered)


def make_norm(config: ModelConfig, size: int) -> RMSNorm:
    return RMSNorm(size, eps=config.rms_norm_eps, zero_centered=config.zero_centered_norm)


class GatedRMSNorm(nn.Module):
    """The weight of the norm inside Gated DeltaNet, a plain one; ops.gated_delta_mixer applies it."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps


# torch's layers draw random weights when they are made. Here weights come from a folder or from `initialize`, and on
# the meta device the drawing alone imports torch's compiler: 80 MB.


class Linear(nn.Linear):
    """torch's layer, multiplied by ops.linear; its weights have no values yet."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD, self.weight, self.bias)


class Embedding(nn.Embedding):
    """torch's layer, looked up by ops.embedding; its weights have no values yet."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return ops.embedding(token_ids_T, self.weight)


class Conv1d(nn.Conv1d):
    """torch's layer as a place for weights, which have no values yet."""

    def reset_parameters(self) -> None:
        pass


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class RotaryEmbedding(nn.Module):
    """cos and sin of a batch, computed once and shared by all full-attention layers.

    Frequencies are a function of the configuration, always fp32. They are no buffer: a cast of the model to bf16 would
    round them, which ruins long contexts, and `to_empty` would fill them with garbage that no checkpoint mends.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._frequencies, self.attention_factor = _frequencies(config)
        self._on_device = self._frequencies

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        if self._on_device.device != positions_T.device:
            self._on_device = self._frequencies.to(positions_T.device)
        return ops.rope_cos_sin(positions_T, self._on_device, attention_factor=self.attention_factor)


def _frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    scaling = config.rope_scaling
    if scaling is None:
        return ops.rope_frequencies(config.rotary_dim, theta=config.rope_theta), 1.0
    return ops.yarn_frequencies(
        config.rotary_dim,
        theta=config.rope_theta,
        factor=scaling.factor,
        original_length=scaling.original_max_position_embeddings,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        attention_factor=scaling.attention_factor,
        truncate=scaling.truncate,
    )
