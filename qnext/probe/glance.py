"""How long states last and how open gates are, seen in one step of a running engine.

Legend: R rows that are looked at, X outputs of a projection, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qnext.model import CausalLM
from qnext.model.attention import Attention
from qnext.model.delta_net import GatedDeltaNet

_ROWS = 64  # of a step, its last ones


class LayerGlance(NamedTuple):
    """Numbers of one layer. A mean of gates is that of their sigmoid; None for a layer without gates."""

    layer: int
    half_lives: tuple[float, ...]  # tokens, of each head the median; empty for full attention
    gate: float | None


class Glance(NamedTuple):
    num_rows: int
    layers: tuple[LayerGlance, ...]


class Glancer:
    """Looks at one step of a model when somebody has asked. Otherwise the model has no hooks."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._last: Glance | None = None
        self.is_asked = False

    def ask(self) -> Glance | None:
        """The last glance; the next step will be looked at. Any thread may ask."""
        self.is_asked = True
        return self._last

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The step in the block is looked at, at the projections in front of the mixers: all ops stay fused."""
        self.is_asked = False
        seen: dict[int, dict[str, Tensor]] = {}
        handles = []
        for index, layer in enumerate(self._model.model.layers):
            mixer = next(part for part in layer.children() if isinstance(part, (GatedDeltaNet, Attention)))
            for part in ("in_proj_qkvz", "in_proj_ba") if isinstance(mixer, GatedDeltaNet) else ("q_proj",):
                keep = partial(_keep, seen.setdefault(index, {}), part)
                handles.append(mixer.get_submodule(part).register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._last = self._glance(seen)

    @torch.inference_mode()
    def _glance(self, seen: dict[int, dict[str, Tensor]]) -> Glance:
        layers: list[LayerGlance] = []
        num_rows = 0
        for index, layer in enumerate(self._model.model.layers):
            for mixer in layer.children():
                rows = seen.get(index, {})
                if isinstance(mixer, GatedDeltaNet) and len(rows) == 2:
                    g_RH, gate_RHV = mixer.gates(rows["in_proj_qkvz"], rows["in_proj_ba"])
                    half_life_H = -torch.log(torch.tensor(2.0)) / g_RH.float().median(0).values.clamp(max=-1e-9)
                    layers.append(LayerGlance(index, tuple(half_life_H.tolist()), _openness(gate_RHV)))
                    num_rows = len(g_RH)
                elif isinstance(mixer, Attention) and rows:
                    gate_RHK = mixer.gates(rows["q_proj"])
                    layers.append(LayerGlance(index, (), None if gate_RHK is None else _openness(gate_RHK)))
                    num_rows = len(rows["q_proj"])
        return Glance(num_rows, tuple(layers))


def _keep(seen: dict[str, Tensor], part: str, module: nn.Module, inputs: Any, output_TX: Tensor) -> None:
    """A step may have several batches: the last one counts."""
    seen[part] = output_TX if len(output_TX) <= _ROWS else output_TX[-_ROWS:].clone()


def _openness(gate: Tensor) -> float:
    return float(torch.sigmoid(gate.float()).mean())
