"""The hooks of one decoder layer. They lie where a fused op stays fused.

Legend: T tokens, D hidden, Z width of a mixer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnext.model import Batch, DecoderLayer, SparseMoE
from qnext.probe import names
from qnext.probe.feed_forward import SparseHooks
from qnext.probe.mixers import AttentionHooks, DeltaHooks
from qnext.probe.rows import BatchRows
from qnext.probe.sight import Sight


class LayerHooks:
    """Shows the parts of a layer to a Sight. The layer goes on with what the Sight makes of them."""

    def __init__(self, layer: DecoderLayer, prefix: str, sight: Sight) -> None:
        self._layer, self._prefix, self._sight = layer, prefix, sight
        self._rows: BatchRows | None = None
        self._mid_TD: Tensor | None = None
        self._is_finishing = False

    def attach(self) -> list[RemovableHandle]:
        layer = self._layer
        handles = [layer.register_forward_pre_hook(self._before)]
        if self._wants(names.RESIDUAL_OUT, names.RESIDUAL_MID) or self._sight.observes("residual"):
            handles.append(layer.register_forward_hook(self._after))
        if self._wants(names.RESIDUAL_MID):
            handles.append(layer.post_attention_layernorm.register_forward_pre_hook(self._at_middle))
        mixer = layer.linear_attn if layer.is_linear else layer.self_attn
        kind = DeltaHooks if layer.is_linear else AttentionHooks
        handles += kind(mixer, self._prefix, self._sight).attach()  # before what shows the mixer's result
        handles += self._around(mixer, names.MIXER_IN, names.MIXER_OUT)
        if isinstance(layer.mlp, SparseMoE):
            handles += SparseHooks(layer.mlp, self._prefix, self._sight, self.rows).attach()
        elif self._wants("ffn.inner"):
            down_proj = layer.mlp.get_submodule("down_proj")
            handles.append(down_proj.register_forward_pre_hook(partial(self._show_input, "ffn.inner")))
        return handles + self._around(layer.mlp, names.FFN_IN, names.FFN_OUT)

    def rows(self) -> BatchRows:
        """Of the call that runs."""
        assert self._rows is not None
        return self._rows

    def _around(self, module: nn.Module, before: str, after: str) -> list[RemovableHandle]:
        handles = []
        if self._wants(before):
            handles.append(module.register_forward_pre_hook(partial(self._show_input, before)))
        if self._wants(after):
            handles.append(module.register_forward_hook(partial(self._show_output, after)))
        return handles

    def _wants(self, *parts: str) -> bool:
        return any(f"{self._prefix}.{part}" in self._sight.wanted for part in parts)

    def _show(self, part: str, x_TD: Tensor) -> Tensor:
        return self._sight.show(f"{self._prefix}.{part}", x_TD, self.rows())

    def _show_input(self, part: str, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._show(part, inputs[0]), *inputs[1:]

    def _show_output(self, part: str, module: nn.Module, inputs: Any, output_TD: Tensor) -> Tensor:
        return self._show(part, output_TD)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._rows = self._sight.rows_of(inputs[1])
        return self._show(names.RESIDUAL_IN, inputs[0]), *inputs[1:]

    def _at_middle(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if not self._is_finishing:
            self._mid_TD = inputs[0]
            self._sight.keep(f"{self._prefix}.{names.RESIDUAL_MID}", inputs[0], self.rows())

    def _after(self, module: nn.Module, inputs: tuple[Tensor, Batch, Any], output_TD: Tensor) -> Tensor:
        if f"{self._prefix}.{names.RESIDUAL_MID}" in self._sight.edited:
            assert self._mid_TD is not None
            mid_TD = self._show(names.RESIDUAL_MID, self._mid_TD)
            if mid_TD is not self._mid_TD:
                output_TD = self._finish(mid_TD, inputs[1])
        output_TD = self._show(names.RESIDUAL_OUT, output_TD)
        if self._sight.observer is not None and self._sight.observes("residual"):
            self._sight.observer.see_residual(self._prefix, self.rows(), output_TD)
        return output_TD

    def _finish(self, mid_TD: Tensor, batch: Batch) -> Tensor:
        """The second half once more. The experts were counted in the first pass."""
        cache = None if batch.cache is None else replace(batch.cache, expert_load={})
        self._is_finishing = True
        try:
            return self._layer.finish(mid_TD, replace(batch, cache=cache))
        finally:
            self._is_finishing = False
