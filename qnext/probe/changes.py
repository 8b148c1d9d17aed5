"""Edits that are often wanted.

Legend: R rows that are meant, D hidden, E experts, A experts of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.probe.edits import Edit
from qnext.probe.rows import EVERYWHERE, Where


def steer(tap: str, vector: Tensor, *, strength: float = 1.0, where: Where = EVERYWHERE) -> Edit:
    """Adds `strength` times a vector to every row: of the residual stream, for instance. Gradients reach the vector."""
    return Edit(tap, lambda x_R: x_R + (strength * vector).to(x_R.dtype), where)


def scale(tap: str, factor: float, *, where: Where = EVERYWHERE) -> Edit:
    """Every row times `factor`; 0 silences."""
    return Edit(tap, lambda x_R: x_R * factor, where)


def replace(tap: str, values: Tensor, *, where: Where = EVERYWHERE) -> Edit:
    """These rows, or this row for all, take the place of what is there: what another text gave, for instance."""
    return Edit(tap, lambda x_R: values.to(x_R.dtype).expand_as(x_R), where)


def silence_expert(layer: str, expert: int, *, where: Where = EVERYWHERE) -> tuple[Edit, Edit]:
    """What one expert of `layers.3` or `mtp` gives becomes zero. The other experts of a token keep their weights."""
    chosen: list[Tensor] = []

    def see(experts_RA: Tensor) -> Tensor:
        chosen[:] = [experts_RA]
        return experts_RA

    def silence(weights_RA: Tensor) -> Tensor:
        return weights_RA.masked_fill(chosen[0] == expert, 0.0)

    return Edit(f"{layer}.router.experts", see, where), Edit(f"{layer}.router.weights", silence, where)


def avoid_expert(layer: str, expert: int, *, where: Where = EVERYWHERE) -> Edit:
    """The router never chooses this expert: the next best one takes its place, with weights that add up as ever."""

    def avoid(logits_RE: Tensor) -> Tensor:
        lowest = logits_RE.amin(-1, keepdim=True) - 100.0  # infinities would make NaN of a softmax over one
        return logits_RE.index_copy(1, torch.tensor([expert], device=logits_RE.device), lowest)

    return Edit(f"{layer}.router.logits", avoid, where)
