"""Several adapters in one model, of which each row of a batch may have another, or none.

The factors of all adapters of a matrix lie side by side: a row is multiplied by all A, what belongs to other adapters
becomes zero, and the rest is multiplied by all B. So a batch of any mixture costs two narrow products more, and a row
has the same bits whatever adapters its neighbours have. Routed experts are computed adapter by adapter.

Legend: T tokens, D inputs, F outputs, E experts, R ranks of all adapters, padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qnext import ops
from qnext.errors import UsageError
from qnext.lora.adapt import Adapter
from qnext.lora.modules import Adapted, take_over
from qnext.model import CausalLM, Experts, Router
from qnext.model.layers import Linear
from qnext.planning import Kind, list_parameters

_RANK_STEP = 32  # inputs that kernels take at a time


class ServedAdapters:
    """The adapters of a model by name, in the order of their numbers, from 1 on; 0 is the model itself.

    `select` says which one each row of the next call of the model has. `fingerprints` tell adapters apart by their
    numbers, not by their names.
    """

    def __init__(self, fingerprints: Mapping[str, str]) -> None:
        self.fingerprints = dict(fingerprints)
        self.adapters_T: Tensor | None = None

    def select(self, adapters_T: Tensor | None) -> None:
        """None: every row is the model's own."""
        self.adapters_T = adapters_T


class _Factors(nn.Module):
    """The factors of one matrix, of all adapters that change it."""

    owners_R: Tensor

    def __init__(self, parts: Mapping[int, ops.LowRank], switch: ServedAdapters, dtype: torch.dtype) -> None:
        super().__init__()
        self._switch = switch
        a_RD = torch.cat([part.A for part in parts.values()])
        b_FR = torch.cat([part.B * part.scale for part in parts.values()], dim=1)
        padding = -len(a_RD) % _RANK_STEP
        owners = [number for number, part in parts.items() for _ in range(len(part.A))] + [-1] * padding
        a_RD, b_FR = nn.functional.pad(a_RD, (0, 0, 0, padding)), nn.functional.pad(b_FR, (0, padding))
        self.a_RD = nn.Parameter(a_RD.to(dtype).contiguous(), requires_grad=False)
        self.b_FR = nn.Parameter(b_FR.to(dtype).contiguous(), requires_grad=False)
        self.register_buffer("owners_R", torch.tensor(owners, device=a_RD.device), persistent=False)

    def forward(self, y_TF: Tensor, x_TD: Tensor) -> Tensor:
        """y and the changes of each row's adapter."""
        adapters_T = self._switch.adapters_T
        if adapters_T is None:
            return y_TF
        narrow_TR = ops.linear(x_TD, self.a_RD.to(x_TD.dtype)) * (adapters_T[:, None] == self.owners_R)
        return y_TF + ops.linear(narrow_TR, self.b_FR.to(x_TD.dtype)).to(y_TF.dtype)

    def keeps_bits(self) -> bool:
        return ops.linear_keeps_bits(self.a_RD) and ops.linear_keeps_bits(self.b_FR)


class ServedLinear(Linear):
    """A projection with the changes of several adapters."""

    def __init__(self, base: Linear, factors: _Factors) -> None:
        nn.Module.__init__(self)
        take_over(self, base)
        self.factors = factors

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.factors(super().forward(x_TD), x_TD)


class ServedRouter(Router):
    """A router with the changes of several adapters."""

    def __init__(self, base: Router, factors: _Factors) -> None:
        nn.Module.__init__(self)
        take_over(self, base)
        self.factors = factors

    def scores(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().scores(x_TD)
        return self.factors(logits_TE, x_TD.to(logits_TE.dtype))


class ServedExperts(Experts):
    """Routed experts with the changes of several adapters. The rows of each adapter are computed apart."""

    def __init__(self, base: Experts, loras: Mapping[int, ops.ExpertsLora], switch: ServedAdapters) -> None:
        nn.Module.__init__(self)
        take_over(self, base)
        self._loras, self._switch = dict(loras), switch
        # Known to torch, so that they count as memory and move.
        self.factors = nn.ParameterList(
            nn.Parameter(factor, requires_grad=False)
            for lora in loras.values()
            for part in lora.parts
            if part is not None
            for factor in (part.A, part.B)
        )

    def forward(self, x_TD: Tensor, routing: ops.Routing, shared: ops.SharedExpert | None = None) -> Tensor:
        assert shared is None, "only the plain experts compute the shared one"
        adapters_T = self._switch.adapters_T
        if adapters_T is None:
            return super().forward(x_TD, routing)
        out_TD = torch.empty_like(x_TD)
        for number in adapters_T.unique().tolist():
            rows = (adapters_T == number).nonzero().squeeze(1)
            part, routed = x_TD[rows], ops.Routing(*(each[rows] for each in routing))
            lora = self._loras.get(number)
            if lora is None:
                out_TD[rows] = super().forward(part, routed)
            else:
                weights = self.gate_up_proj, self.down_proj
                out_TD[rows] = ops.lora_experts_swiglu(part, *weights, lora, routing=routed)
        return out_TD

    def keeps_bits(self) -> bool:
        return False


def serve_adapters(model: CausalLM, adapters: Mapping[str, Adapter]) -> ServedAdapters:
    """Put adapters into a model, in place; its weights stay as they are. Raises UsageError for an adapter of another
    model, naming it."""
    infos = list_parameters(model.config)
    for name, adapter in adapters.items():
        try:
            adapter.check(infos)
        except UsageError as error:
            raise UsageError(f"adapter {name}: {error}") from None
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise UsageError("the model is being trained with an adapter; merge it first")
    switch = ServedAdapters({name: fingerprint(adapter) for name, adapter in adapters.items()})
    numbered = dict(enumerate(adapters.values(), start=1))
    dtype = ops.backend_of(model.device).activation_dtype or model.dtype
    modules = {name.rpartition(".")[0] for adapter in adapters.values() for name in adapter.parts}
    for path in sorted(modules):
        base = model.get_submodule(path)
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, _served(base, path, numbered, switch, dtype))
    return switch


def _served(
    base: nn.Module, path: str, adapters: Mapping[int, Adapter], switch: ServedAdapters, dtype: torch.dtype
) -> nn.Module:
    if isinstance(base, Experts):
        loras = {number: _experts_lora(adapter, path) for number, adapter in adapters.items()}
        return ServedExperts(base, {number: lora for number, lora in loras.items() if any(lora.parts)}, switch)
    name = f"{path}.weight"
    factors = _Factors({n: each.parts[name] for n, each in adapters.items() if name in each.parts}, switch, dtype)
    if isinstance(base, Router):
        return ServedRouter(base, factors)
    assert isinstance(base, Linear), type(base)
    return ServedLinear(base, factors)


def _experts_lora(adapter: Adapter, path: str) -> ops.ExpertsLora:
    gate_up, down = (adapter.parts.get(f"{path}.{name}_proj") for name in ("gate_up", "down"))
    return ops.ExpertsLora(gate_up, down, adapter.places.get(path))


def fingerprint(adapter: Adapter) -> str:
    """A name of what an adapter changes: equal for equal factors, wherever they come from."""
    digest = hashlib.sha256()
    for name in sorted(adapter.parts):
        part = adapter.parts[name]
        places_E = adapter.places.get(name.rpartition(".")[0])
        digest.update(f"{name}/{part.scale}/{None if places_E is None else places_E.tolist()}".encode())
        for factor in (part.A, part.B):
            digest.update(f"{factor.dtype}{list(factor.shape)}".encode())
            digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def changes_experts(adapter: Adapter, model: CausalLM) -> bool:
    """Whether an adapter changes routed experts, whose rows are computed apart."""
    infos = list_parameters(model.config)
    return any(infos[name].kind in (Kind.EXPERTS_GATE_UP, Kind.EXPERTS_DOWN) for name in adapter.parts)
