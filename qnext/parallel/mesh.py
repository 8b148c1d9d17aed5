"""How many ranks there are, and which of them one is. Integers only, no torch."""

from __future__ import annotations

from typing import NamedTuple

from qnext.config import ModelConfig
from qnext.errors import UsageError

PATIENCE = 60.0  # seconds without a sign of life of a rank, whose process gives one twice a second whatever it computes


class Mesh(NamedTuple):
    """`tensor` times `expert` ranks. Heads, dense matrices and the vocabulary are cut into `tensor` parts, of which
    there are `expert` copies. Routed experts are spread over all ranks."""

    tensor: int = 1
    expert: int = 1
    rank: int = 0

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.expert

    @property
    def part(self) -> int:
        """Which part of cut matrices this rank has."""
        return self.rank % self.tensor

    @property
    def tensor_ranks(self) -> tuple[int, ...]:
        """The ranks that have all parts together with this one, in the order of the parts."""
        first = self.rank - self.part
        return tuple(range(first, first + self.tensor))

    def span(self, length: int, *, unit: int = 1) -> tuple[int, int]:
        """The part of this rank of so many rows."""
        return span(length, self.tensor, self.part, unit=unit)

    def widths(self, length: int, *, unit: int = 1) -> tuple[int, ...]:
        """How many rows each part has."""
        spans = (span(length, self.tensor, part, unit=unit) for part in range(self.tensor))
        return tuple(end - start for start, end in spans)


def span(length: int, num_parts: int, part: int, *, unit: int = 1) -> tuple[int, int]:
    """Parts of whole units, as far as the length has any for each, that differ by one unit at most.

    >>> [span(10, 3, part) for part in range(3)], [span(96, 4, part, unit=16) for part in range(4)]
    ([(0, 3), (3, 6), (6, 10)], [(0, 16), (16, 48), (48, 64), (64, 96)])
    """
    if length % unit or length // unit < num_parts:
        unit = 1
    count = length // unit
    return count * part // num_parts * unit, count * (part + 1) // num_parts * unit


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises UsageError, which names the size that cannot be cut so."""
    if mesh.tensor < 1 or mesh.expert < 1:
        raise UsageError(f"--tensor-parallel {mesh.tensor} --expert-parallel {mesh.expert}: both are at least 1")
    heads = [("num_attention_heads", config.num_attention_heads)] if config.num_full_layers else []
    if config.has_linear_layers:
        heads.append(("linear_num_key_heads", config.linear_num_key_heads))
    for name, count in heads:
        if count % mesh.tensor:
            raise UsageError(f"--tensor-parallel {mesh.tensor}: {name} is {count}, which it does not divide")
    num_kv = config.num_key_value_heads
    if num_kv % mesh.tensor and mesh.tensor % num_kv:
        raise UsageError(
            f"--tensor-parallel {mesh.tensor}: num_key_value_heads is {num_kv}; heads can be divided among ranks, or "
            f"each repeated on as many, but {mesh.tensor} and {num_kv} allow neither"
        )
    if mesh.expert > 1 and not config.num_experts:
        raise UsageError(f"--expert-parallel {mesh.expert}: the model has no experts")
    if config.num_experts and mesh.num_ranks > config.num_experts:
        raise UsageError(f"{mesh.num_ranks} ranks are more than the {config.num_experts} experts of a layer")
