"""The only place where names or shapes change between disk and model, in both directions. No torch.

Two things differ: routed experts are one tensor per expert and projection on disk and stacked in the model, and a
tied head exists only in the model.

Legend: E experts, F expert width, D hidden.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from qnext.config import ModelConfig
from qnext.planning import parameter_shapes

_STACKED = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)")
_LEFTOVER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


class Part(NamedTuple):
    """A tensor on disk and its place in a parameter: all of it, or rows of one expert."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def place(self) -> tuple[int | slice, ...]:
        """What selects the part in its parameter."""
        if self.expert is None:
            return (...,)  # type: ignore[return-value]
        return (self.expert,) if self.rows is None else (self.expert, slice(*self.rows))


def disk_parts(name: str, shape: tuple[int, ...]) -> list[Part]:
    """The tensors on disk that make up the parameter `name`.

    gate_up_proj [E, 2F, D] holds for each expert the F rows of gate_proj and then the F rows of up_proj.
    """
    match = _STACKED.fullmatch(name)
    if match is None:
        return [Part(name, shape)]
    prefix, kind = match.groups()
    num_experts, rows, columns = shape
    if kind == "down_proj":
        return [Part(f"{prefix}{e}.down_proj.weight", (rows, columns), e) for e in range(num_experts)]
    width = rows // 2
    return [
        Part(f"{prefix}{e}.{half}_proj.weight", (width, columns), e, (start, start + width))
        for e in range(num_experts)
        for half, start in (("gate", 0), ("up", width))
    ]


def num_disk_parts(name: str, shape: tuple[int, ...]) -> int:
    """How many tensors disk_parts lists, without listing them."""
    match = _STACKED.fullmatch(name)
    return 1 if match is None else shape[0] * (1 if match[2] == "down_proj" else 2)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder of this configuration must hold."""
    return {
        part.name: part.shape for name, shape in parameter_shapes(config).items() for part in disk_parts(name, shape)
    }


def is_leftover(name: str) -> bool:
    """Whether a tensor only repeats the configuration (rotary frequencies in files of old transformers)."""
    return _LEFTOVER.fullmatch(name) is not None


def module_of(name: str) -> str:
    """The module that a tensor on disk belongs to: its name without the last word."""
    return name.rpartition(".")[0]


def scale_name(name: str) -> str:
    """Name of the block scales of an FP8 weight. They multiply, whatever the name says."""
    return name + "_scale_inv"
