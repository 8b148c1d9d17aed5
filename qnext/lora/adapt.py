"""Puts adapters into a model, takes them out, and merges them.

Legend: D inputs, F outputs, E experts, K adapted experts, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qnext.errors import UsageError
from qnext.lora.config import ADAPTABLE, LoraConfig
from qnext.lora.modules import Adapted, LoraExperts, adapted, device_of, plain
from qnext.model import CausalLM
from qnext.model.init import fill_uniform, generator_of
from qnext.ops import LowRank, Weight
from qnext.planning import Kind, ParameterInfo, list_parameters


@dataclass(frozen=True)
class Adapter:
    """The factors of an adapter, by the names of the parameters that they change."""

    parts: Mapping[str, LowRank]
    places: Mapping[str, Tensor] = field(default_factory=dict)  # by name of the experts' module: see ExpertsLora

    def delta(self, name: str, expert: int | None = None) -> Tensor | None:
        """[F, D] fp32: the change of a parameter, or of one expert of it; None where there is none."""
        factors = self._factors(name, expert)
        if factors is None:
            return None
        a, b = (factor.float() for factor in factors)
        return (b @ a).mul_(self.parts[name].scale)

    def changes(self, name: str, expert: int | None = None) -> bool:
        """Whether the change of a parameter, or of one expert of it, is not zero."""
        factors = self._factors(name, expert)
        return factors is not None and all(bool(factor.any()) for factor in factors)

    def check(self, infos: Mapping[str, ParameterInfo]) -> None:
        """Raises UsageError naming a part that a model of these parameters has no place for, or whose sizes differ."""
        for name, part in self.parts.items():
            if name not in infos or infos[name].kind not in ADAPTABLE:
                raise UsageError(
                    f"the adapter changes {name}, which this model does not have or which is never adapted"
                )
            outputs, inputs = infos[name].block_shape
            if part.A.shape[-1] != inputs or part.B.shape[-2:] != (outputs, part.A.shape[-2]):
                raise UsageError(
                    f"the adapter's factors {list(part.A.shape)} and {list(part.B.shape)} do not fit {name} "
                    f"{list(infos[name].shape)}; it belongs to another model"
                )

    def _factors(self, name: str, expert: int | None) -> tuple[Tensor, Tensor] | None:
        part = self.parts.get(name)
        if part is None:
            return None
        if expert is None:
            return part.A, part.B
        places_E = self.places.get(name.rpartition(".")[0])
        place = expert if places_E is None else int(places_E[expert])
        if place < 0:
            return None
        a, b = (factor[place if len(factor) > 1 else 0] for factor in (part.A, part.B))
        return a, b


class _Site(NamedTuple):
    """A module that is adapted, and its parameters."""

    module: str
    infos: list[ParameterInfo]


def _sites(infos: Mapping[str, ParameterInfo], wanted: Collection[str]) -> list[_Site]:
    sites: dict[str, _Site] = {}
    for name in infos:
        if name in wanted:
            module = name.rpartition(".")[0]
            sites.setdefault(module, _Site(module, [])).infos.append(infos[name])
    return list(sites.values())


def add_lora(model: CausalLM, config: LoraConfig, *, seed: int = 0) -> None:
    """Freeze a model and give it factors that change nothing yet, in place. Each factor depends on seed and name alone.

    Of two factors one is zero: the one that belongs to a single expert, so that an expert that no token reaches stays
    as it was. Raises UsageError where nothing is to be adapted, or a layer or an expert does not exist.
    """
    _refuse_adapted(model)
    infos = list_parameters(model.config)
    sites = _sites(infos, {name for name, info in infos.items() if config.wants(info)})
    places = _places(model, config, sites)
    parts: dict[str, LowRank] = {}
    for site in sites:
        if site.infos[0].expert_axis is not None and config.experts is not None and site.module not in places:
            continue
        for info in site.infos:
            num_parts = int(places[site.module].max()) + 1 if site.module in places else None
            parts[info.name] = _new_part(model, info, config, num_parts, seed)
    if not parts:
        raise UsageError(f"the model has nothing that lora targets {config.targets!r} name")
    attach(model, Adapter(parts, places))


def _refuse_adapted(model: CausalLM) -> None:
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise UsageError("the model has an adapter already; merge it first")


def _places(model: CausalLM, config: LoraConfig, sites: list[_Site]) -> dict[str, Tensor]:
    if config.experts is None:
        return {}
    by_layer = {site.infos[0].layer: site.module for site in sites if site.infos[0].expert_axis is not None}
    places: dict[str, Tensor] = {}
    for layer, experts in config.experts.items():
        count = model.config.num_experts
        wrong = [expert for expert in experts if not 0 <= expert < count]
        if layer not in by_layer or wrong:
            culprit = f"expert {wrong[0]} of {count}" if wrong else "which has no routed experts to adapt"
            raise UsageError(f"experts of layer {layer}: {culprit}")
        if not experts:
            continue
        places[by_layer[layer]] = torch.full((count,), -1)
        chosen = torch.tensor(sorted(set(experts)))
        places[by_layer[layer]][chosen] = torch.arange(len(chosen))
    return places


def _new_part(model: CausalLM, info: ParameterInfo, config: LoraConfig, num_parts: int | None, seed: int) -> LowRank:
    outputs, inputs = info.block_shape
    rank = min(config.rank, outputs, inputs)
    a_shape: tuple[int, ...] = (rank, inputs)
    b_shape: tuple[int, ...] = (outputs, rank)
    is_b_random = False
    if info.expert_axis is not None:
        count = info.shape[0] if num_parts is None else num_parts
        is_b_random = config.shares_outer and info.kind is Kind.EXPERTS_DOWN
        a_shape = (1 if config.shares_outer and not is_b_random else count, *a_shape)
        b_shape = (1 if is_b_random else count, *b_shape)
    module = model.get_submodule(info.name.rpartition(".")[0])
    device = device_of(getattr(module, info.name.rpartition(".")[2]))
    wide = torch.promote_types(model.dtype, torch.float32)
    a, b = (torch.zeros(shape, dtype=wide, device=device) for shape in (a_shape, b_shape))
    random = b if is_b_random else a
    fill_uniform(random, bound=random.shape[-1] ** -0.5, generator=generator_of(f"{seed}/{info.name}/lora", device))
    return LowRank(a, b, config.scale)


def attach(model: CausalLM, adapter: Adapter) -> None:
    """Freeze a model and adapt it, in place. The factors are not copied.

    Raises UsageError naming a part that the model has no place for, or whose sizes differ.
    """
    _refuse_adapted(model)
    infos = list_parameters(model.config)
    adapter.check(infos)
    model.requires_grad_(False)
    for site in _sites(infos, adapter.parts):
        parent, _, key = site.module.rpartition(".")
        base = model.get_submodule(site.module)
        of_site = {info.name.rpartition(".")[2]: adapter.parts[info.name] for info in site.infos}
        setattr(model.get_submodule(parent), key, adapted(base, of_site, adapter.places.get(site.module)))


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapted))


def adapter_of(model: CausalLM) -> Adapter:
    """The adapter of a model; its tensors are those that are trained."""
    parts, places = {}, {}
    for path, module in adapted_modules(model):
        for key, part in module.parts().items():
            parts[f"{path}.{key}"] = LowRank(part.A.detach(), part.B.detach(), part.scale)
        if isinstance(module, LoraExperts) and module.places_E is not None:
            places[path] = module.places_E
    return Adapter(parts, places)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors by name, which are all that an adapted model trains."""
    return {
        f"{path}.{key}": parameter
        for path, module in adapted_modules(model)
        for key, parameter in module.named_parameters(recurse=False)
        if "lora_" in key
    }


@torch.no_grad()
def merge(model: CausalLM) -> None:
    """Make the changes a part of the weights, in place: computed in fp32 and rounded once. The factors are gone then.

    Raises UsageError for packed weights: checkpoint.merge does that, folder to folder.
    """
    adapter = adapter_of(model)
    for path, module in list(adapted_modules(model)):
        base = plain(module)
        for key in module.parts():
            weight = getattr(base, key)
            if isinstance(weight, Weight):
                raise UsageError(f"{path}.{key} is packed; merge the adapter into a folder")
            experts: list[int | None] = [None] if weight.dim() == 2 else list(range(len(weight)))
            for expert in experts:
                delta = adapter.delta(f"{path}.{key}", expert)
                if delta is not None:
                    matrix = weight.data if expert is None else weight.data[expert]
                    matrix.copy_(matrix.to(torch.promote_types(matrix.dtype, torch.float32)) + delta)
        parent, _, key = path.rpartition(".")
        setattr(model.get_submodule(parent), key, base)
    model.requires_grad_(True)


def train_only(model: CausalLM, kinds: Collection[Kind], *, mtp: bool = True) -> None:
    """Full tuning of some kinds of parameters: the others are frozen. Raises UsageError where the model has none."""
    infos = list_parameters(model.config)
    found = False
    for name, parameter in model.named_parameters():
        is_wanted = infos[name].kind in kinds and (mtp or infos[name].part != "mtp")
        parameter.requires_grad_(is_wanted)
        found |= is_wanted
    if not found:
        raise UsageError(f"the model has no {', '.join(sorted(kind.value for kind in kinds))} to train")
