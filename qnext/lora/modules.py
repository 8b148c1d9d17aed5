"""Modules of a model with a low-rank change. They share the weights of the modules in whose place they stand.

The weights keep their names; the factors are parameters beside them. Their class is no plain one, so no fused op passes
them by: see model.layers.fusable.

Legend: T tokens, D inputs, F outputs, E experts, K adapted experts, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.model import Experts, HoldsWeights, Router
from qnext.model.layers import Linear


def low_rank(x_TD: Tensor, part: ops.LowRank) -> Tensor:
    """[T, F]: scale * B A x"""
    narrow_TR = ops.linear(x_TD, part.A.to(x_TD.dtype))
    return ops.linear(narrow_TR, part.B.to(x_TD.dtype)) * part.scale


def take_over(module: HoldsWeights, base: HoldsWeights) -> None:
    """Everything of `base` becomes that of `module`, nothing is copied."""
    for name, value in vars(base).items():
        module.__dict__[name] = dict(value) if name in ("_parameters", "_weights", "_buffers", "_modules") else value


class Adapted(nn.Module):
    """A module with a low-rank change of `parts`: the name of each changed parameter, and its factors."""

    def parts(self) -> dict[str, ops.LowRank]:
        raise NotImplementedError


class LoraLinear(Linear, Adapted):
    """x (W + scale B A)^T"""

    def __init__(self, base: Linear, part: ops.LowRank) -> None:
        nn.Module.__init__(self)
        take_over(self, base)
        self.lora_A, self.lora_B, self.lora_scale = nn.Parameter(part.A), nn.Parameter(part.B), part.scale

    def forward(self, x_TD: Tensor) -> Tensor:
        return super().forward(x_TD) + low_rank(x_TD, self.parts()["weight"])

    def parts(self) -> dict[str, ops.LowRank]:
        return {"weight": ops.LowRank(self.lora_A, self.lora_B, self.lora_scale)}

    def keeps_bits(self) -> bool:
        return super().keeps_bits() and ops.linear_keeps_bits(self.lora_A) and ops.linear_keeps_bits(self.lora_B)


class LoraRouter(Router, Adapted):
    """A router that scores with W + scale B A."""

    def __init__(self, base: Router, part: ops.LowRank) -> None:
        nn.Module.__init__(self)
        take_over(self, base)
        self.lora_A, self.lora_B, self.lora_scale = nn.Parameter(part.A), nn.Parameter(part.B), part.scale

    def scores(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().scores(x_TD)
        return logits_TE + low_rank(x_TD.to(logits_TE.dtype), self.parts()["weight"])

    def parts(self) -> dict[str, ops.LowRank]:
        return {"weight": ops.LowRank(self.lora_A, self.lora_B, self.lora_scale)}

    def keeps_bits(self) -> bool:
        return super().keeps_bits() and ops.linear_keeps_bits(self.lora_A) and ops.linear_keeps_bits(self.lora_B)


class LoraExperts(Experts, Adapted):
    """All routed experts of a layer, of which those in `places_E` are changed; see ops.ExpertsLora."""

    places_E: Tensor | None

    def __init__(self, base: Experts, lora: ops.ExpertsLora) -> None:
        nn.Module.__init__(self)
        take_over(self, base)
        self._scales: dict[str, float] = {}
        for name, part in zip(("gate_up", "down"), lora.parts, strict=True):
            if part is not None:
                self.register_parameter(f"{name}_lora_A", nn.Parameter(part.A))
                self.register_parameter(f"{name}_lora_B", nn.Parameter(part.B))
                self._scales[name] = part.scale
        self.register_buffer("places_E", lora.places_E, persistent=False)

    @property
    def lora(self) -> ops.ExpertsLora:
        return ops.ExpertsLora(self._part("gate_up"), self._part("down"), self.places_E)

    def _part(self, name: str) -> ops.LowRank | None:
        if name not in self._scales:
            return None
        a, b = (self.get_parameter(f"{name}_lora_{factor}") for factor in "AB")
        return ops.LowRank(a, b, self._scales[name])

    def forward(self, x_TD: Tensor, routing: ops.Routing, shared: ops.SharedExpert | None = None) -> Tensor:
        assert shared is None, "only the plain experts compute the shared one"
        return ops.lora_experts_swiglu(x_TD, self.gate_up_proj, self.down_proj, self.lora, routing=routing)

    def parts(self) -> dict[str, ops.LowRank]:
        return {f"{name}_proj": part for name in self._scales if (part := self._part(name)) is not None}

    def keeps_bits(self) -> bool:
        return False


def adapted(base: nn.Module, parts: dict[str, ops.LowRank], places_E: Tensor | None = None) -> nn.Module:
    """`base` with changes of its parameters."""
    if isinstance(base, Experts):
        return LoraExperts(base, ops.ExpertsLora(parts.get("gate_up_proj"), parts.get("down_proj"), places_E))
    (part,) = parts.values()
    if isinstance(base, Router):
        return LoraRouter(base, part)
    assert isinstance(base, Linear), type(base)
    return LoraLinear(base, part)


def plain(module: nn.Module) -> nn.Module:
    """The module without its change."""
    kind: Any = next(each for each in (Linear, Router, Experts) if isinstance(module, each))
    base = kind.__new__(kind)
    nn.Module.__init__(base)
    assert isinstance(module, HoldsWeights)
    take_over(base, module)
    for name in [name for name in base._parameters if "lora_" in name]:
        del base._parameters[name]
    base._buffers.pop("places_E", None)
    for name in ("lora_scale", "_scales"):
        vars(base).pop(name, None)
    return base


def device_of(weight: Tensor | ops.Weight) -> torch.device:
    """Where the factors of a weight lie."""
    return weight.device if isinstance(weight, Tensor) else weight.tensors[0].device
