"""Small modules that every family shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.config import ModelConfig
from qnext.model.weights import HoldsWeights

See: TypeAlias = Callable[[str, Tensor], Tensor]  # name and tensor of a step -> what the next step takes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` computes exactly what `kind` computes: it is of this class, not of a subclass, and has no
    hooks."""
    state = vars(module)
    return type(module) is kind and "forward" not in state and not any(state[hooks] for hooks in _HOOKS)


def unseen(name: str, x: Tensor) -> Tensor:
    """Nobody looks, and nothing changes."""
    return x


class Fusable(nn.Module):
    """A part of a mixer or a feed-forward that a fused op can compute: see fusable."""

    def fusable_weight(self) -> Tensor | ops.Weight | None:
        kind = type(self)
        is_alone = kind in _PARTS and is_plain(self, kind) and getattr(self, "bias", None) is None
        return self.weight if is_alone else None  # type: ignore[return-value]


def fusable(module: nn.Module) -> Tensor | ops.Weight | None:
    """The weight that a fused op may read instead of calling `module`; None where `module` has to be called.

    No other code reads the weight of a module. A fused op calls no module, so its caller asks every part first. A part
    that was replaced (by a LoRA or a shard) has another class, and a hooked part has hooks: both have no fusable
    weight. Then the parts are called one after the other.
    """
    return module.fusable_weight() if isinstance(module, Fusable) else None


def keeps_bits(module: nn.Module) -> bool:
    """Whether a call of `module`, without what is below it, computes each row as it does alone (ops.invariance).

    A module of a foreign class that has tensors of its own is not known to.
    """
    if isinstance(module, KeepsBits):
        return module.keeps_bits()
    return type(module) in _ROW_BY_ROW or next(iter(module.parameters(recurse=False)), None) is None


@runtime_checkable
class KeepsBits(Protocol):
    """A module that knows whether the ops that it calls keep a row's bits: its sizes and weights decide it.

    A subclass that computes otherwise answers for itself.
    """

    def keeps_bits(self) -> bool: ...


class RMSNorm(Fusable):
    """RMSNorm with the scale 1 + weight (Qwen3-Next) where `zero_centered`, and weight (Qwen3) otherwise."""

    def __init__(self, size: int, *, eps: float, zero_centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.zero_centered = zero_centered

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps, zero_centered=self.zero_centered)

    def fusable_norm(self) -> ops.Norm | None:
        """What a fused op may compute instead of calling this; None where it has to be called: see fusable."""
        weight_D = self.fusable_weight()
        return ops.Norm(weight_D, self.eps, self.zero_centered) if isinstance(weight_D, Tensor) else None


def make_norm(config: ModelConfig, size: int) -> RMSNorm:
    return RMSNorm(size, eps=config.rms_norm_eps, zero_centered=config.zero_centered_norm)


class GatedRMSNorm(Fusable):
    """The norm inside Gated DeltaNet: normalised per head, times weight, times silu of the gate."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_THV: Tensor, gate_THV: Tensor) -> Tensor:
        return ops.gated_rms_norm(x_THV, gate_THV, self.weight, eps=self.eps)


# torch's layers draw random weights when they are made. Here weights come from a folder or from `initialize`, and on
# the meta device the drawing alone imports torch's compiler: 80 MB.


class Linear(Fusable, HoldsWeights, nn.Linear):
    """torch's layer, computed by ops.linear. Its weights have no values yet."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x_TD: Tensor) -> Tensor:
        return ops.linear(x_TD, self.weight, self.bias)

    def keeps_bits(self) -> bool:
        return ops.linear_keeps_bits(self.weight)


class Embedding(nn.Embedding):
    """torch's layer, looked up by ops.embedding. Its weights have no values yet."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return ops.embedding(token_ids_T, self.weight, dtype=ops.activation_dtype(self.weight))


class Conv1d(Fusable, nn.Conv1d):
    """torch's layer, causal and followed by silu. Its weights have no values yet."""

    def reset_parameters(self) -> None:
        pass

    def forward(  # type: ignore[override]
        self, x_TC: Tensor, packing: ops.Packing, initial_NWC: Tensor | None = None
    ) -> ops.ConvOutput:
        return ops.causal_conv1d_silu(x_TC, self.weight.squeeze(1), packing=packing, initial_state_NWC=initial_NWC)


def normed_products(norm: nn.Module, hidden_TD: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """What each of `linears` makes of norm(hidden): at once, or by calls where one of them has to be called."""
    form, weights = norm.fusable_norm() if isinstance(norm, RMSNorm) else None, [fusable(each) for each in linears]
    if form is None or any(weight is None for weight in weights):
        normed_TD = norm(hidden_TD)
        return tuple(linear(normed_TD) for linear in linears)
    return ops.normed_linears(hidden_TD, form, tuple(weight for weight in weights if weight is not None)).products


def added_product(residual_TF: Tensor, x_TD: Tensor, linear: nn.Module) -> Tensor:
    """residual + linear(x)"""
    weight = fusable(linear)
    return ops.add(residual_TF, linear(x_TD)) if weight is None else ops.add_linear(residual_TF, x_TD, weight)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, bias=False)
        self.up_proj = Linear(hidden_size, width, bias=False)
        self.down_proj = Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.inner(x_TD))

    def add_to(self, hidden_TD: Tensor, norm: nn.Module) -> Tensor:
        """hidden + self(norm(hidden))"""
        gate_TF, up_TF = normed_products(norm, hidden_TD, (self.gate_proj, self.up_proj))
        return added_product(hidden_TD, ops.swiglu(gate_TF, up_TF), self.down_proj)

    def inner(self, x_TD: Tensor) -> Tensor:
        """What down_proj takes."""
        return ops.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD))


_PARTS = (Linear, RMSNorm, GatedRMSNorm, Conv1d)
# The last two compute alone only where no kernel serves the mixer around them, which says so.
_ROW_BY_ROW = (Embedding, RMSNorm, GatedRMSNorm, Conv1d)


class RotaryEmbedding(nn.Module):
    """cos and sin of a batch, computed once and shared by all full-attention layers.

    Frequencies are a function of the configuration, always fp32. They are no buffer: a cast of the model to bf16 would
    round them, which ruins long contexts, and `to_empty` would fill them with values that no checkpoint corrects.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._frequencies, self.attention_factor = _frequencies(config)
        self._on_device = self._frequencies

    def forward(self, positions_T: Tensor) -> ops.Rope:
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
