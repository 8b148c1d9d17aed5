"""What attention looks at, how open its gates are, and how large the residual stream becomes, on one text.

Legend: T tokens, H query heads, B queries of a block, S keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qnext.model import Batch, CausalLM
from qnext.probe.attending import Attended
from qnext.probe.names import prefix_of
from qnext.probe.probe import ModelProbe
from qnext.probe.rows import BatchRows
from qnext.probe.sight import DeltaSeen


@dataclass(frozen=True)
class AttentionLook:
    """One full-attention layer. Lists have a number for each query head."""

    layer: int
    first_token_mass: tuple[float, ...]  # mean over all queries but the first of what they give to the first token
    gate_openness: tuple[float, ...]  # mean of sigmoid(gate); empty for a model without gates


@dataclass(frozen=True)
class Look:
    """`largest_activation` has for each layer the largest absolute value of the residual stream behind it, `typical`
    the median of the absolute values."""

    num_tokens: int
    attention: tuple[AttentionLook, ...]
    largest_activation: tuple[float, ...]
    typical_activation: tuple[float, ...]

    @property
    def first_token_mass(self) -> float:
        """Mean over layers and heads."""
        masses = [mass for layer in self.attention for mass in layer.first_token_mass]
        return sum(masses) / max(1, len(masses))


@torch.no_grad()
def look(model: CausalLM, token_ids: Sequence[int] | Tensor) -> Look:
    """One pass over a text of two tokens or more, without a cache, and without a matrix of all queries and keys."""
    token_ids_T = torch.as_tensor(token_ids, dtype=torch.long, device=model.device)
    assert len(token_ids_T) > 1
    observer = _Looker()
    with ModelProbe(model, observer=observer):
        model(Batch.from_lengths(token_ids_T, [len(token_ids_T)]))
    prefixes = [prefix_of(model.config, layer) for layer in range(model.config.num_hidden_layers)]
    return Look(
        num_tokens=len(token_ids_T),
        attention=tuple(
            AttentionLook(layer, tuple(observer.masses[prefix]), tuple(observer.gates.get(prefix, ())))
            for layer, prefix in enumerate(prefixes)
            if prefix in observer.masses
        ),
        largest_activation=tuple(observer.largest[prefix] for prefix in prefixes),
        typical_activation=tuple(observer.typical[prefix] for prefix in prefixes),
    )


class _Looker:
    sees: Collection[str] = ("residual", "attention")

    def __init__(self) -> None:
        self.masses: dict[str, list[float]] = {}
        self.gates: dict[str, list[float]] = {}
        self.largest: dict[str, float] = {}
        self.typical: dict[str, float] = {}

    def see_residual(self, prefix: str, rows: BatchRows, hidden_TD: Tensor) -> None:
        sizes = hidden_TD.abs().float()
        self.largest[prefix], self.typical[prefix] = float(sizes.max()), float(sizes.median())

    def see_attention(
        self, prefix: str, rows: BatchRows, attended: Sequence[Attended], steps: Mapping[str, Tensor]
    ) -> None:
        (text,) = attended
        sums_H = torch.zeros(text.q_LHK.shape[1], dtype=torch.float64)
        for block, p_HBS in text.blocks():
            is_later_B = torch.arange(block.start, block.stop) > 0
            sums_H += p_HBS[:, is_later_B, 0].sum(1).double().cpu()
        self.masses[prefix] = (sums_H / (len(text.q_LHK) - 1)).tolist()
        if "gate" in steps:
            self.gates[prefix] = torch.sigmoid(steps["gate"].float()).mean((0, 2)).tolist()

    def see_delta(self, prefix: str, rows: BatchRows, seen: DeltaSeen) -> None:
        raise AssertionError("is not asked for")
