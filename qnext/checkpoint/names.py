"""The only place where names or shapes differ between disk and model, in both directions. No torch.

There are two differences. Routed experts are one tensor per expert and projection on disk, and stacked in the model. A
tied head exists only in the model.

Legend: E experts, F expert width, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from qnext.config import ModelConfig
from qnext.planning import Kind, ParameterInfo, list_parameters

_LEFTOVER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


class Part(NamedTuple):
    """A tensor on disk and its place in a parameter: all of it, an expert, rows, or rows of an expert."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def module(self) -> str:
        """The name of the module on disk: the name without `.weight`. A vector without that suffix has its own name."""
        return self.name.removesuffix(".weight")

    @property
    def place(self) -> tuple[int | slice, ...]:
        """The index that selects the part in its parameter."""
        expert = () if self.expert is None else (self.expert,)
        rows = () if self.rows is None else (slice(*self.rows),)
        return (*expert, *rows) or (...,)  # type: ignore[return-value]


class Target(NamedTuple):
    """Where a tensor of the disk goes: a parameter of the module, and a part of it."""

    parameter: ParameterInfo
    part: Part


def disk_parts(info: ParameterInfo) -> list[Part]:
    """The tensors on disk that make up a parameter.

    gate_up_proj [E, 2F, D] holds for each expert the F rows of gate_proj and then the F rows of up_proj.
    """
    if info.expert_axis is None:
        return [Part(info.name, info.shape)]
    prefix = info.name.rpartition(".")[0]
    num_experts, rows, columns = info.shape
    if info.kind is Kind.EXPERTS_DOWN:
        return [Part(f"{prefix}.{e}.down_proj.weight", (rows, columns), e) for e in range(num_experts)]
    width = rows // 2
    return [
        Part(f"{prefix}.{e}.{half}_proj.weight", (width, columns), e, (start, start + width))
        for e in range(num_experts)
        for half, start in (("gate", 0), ("up", width))
    ]


def parts_by_expert(infos: Iterable[ParameterInfo]) -> Iterator[tuple[ParameterInfo, Part]]:
    """All tensors of the disk, those of one expert together, as released files have them too."""
    by_expert: dict[int, list[tuple[ParameterInfo, Part]]] = {}
    for info in infos:
        if info.expert_axis is None:
            yield from ((info, part) for part in disk_parts(info))
            continue
        for part in disk_parts(info):
            assert part.expert is not None
            by_expert.setdefault(part.expert, []).append((info, part))
        if info.kind is Kind.EXPERTS_DOWN:
            yield from chain.from_iterable(by_expert.values())
            by_expert.clear()


def num_disk_parts(info: ParameterInfo) -> int:
    """The number of tensors that disk_parts lists, without listing them."""
    if info.expert_axis is None:
        return 1
    return info.shape[0] * (1 if info.kind is Kind.EXPERTS_DOWN else 2)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder of this configuration must hold."""
    return {part.name: part.shape for info in list_parameters(config).values() for part in disk_parts(info)}


def is_leftover(name: str) -> bool:
    """Whether a tensor only repeats the configuration (rotary frequencies in files of old transformers versions)."""
    return _LEFTOVER.fullmatch(name) is not None


def module_of(name: str) -> str:
    """The module that a tensor on disk belongs to: its name without the last word."""
    return name.rpartition(".")[0]


def scale_name(name: str) -> str:
    """The name of the block scales of an FP8 weight. They multiply the weight, although the name says "inv"."""
    return name + "_scale_inv"
