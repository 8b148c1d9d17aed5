"""A model that is looked at.

Legend: T tokens, D hidden, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM, DecoderLayer
from qnext.probe.captures import Captures
from qnext.probe.edits import Edit
from qnext.probe.layer import LayerHooks
from qnext.probe.names import READ_ONLY, prefix_of
from qnext.probe.rows import EVERYWHERE, BatchRows, Where
from qnext.probe.sight import Observer, Sight

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelProbe:
    """Sees and changes the inside of a model while it is entered.

    >>> with ModelProbe(model, ["layers.*.residual_out"], where=LAST) as probe:
    ...     model(batch)
    >>> probe.captures.values("layers.3.residual_out")

    Every fused op stays fused. Inner steps are computed once more beside it, and replace its result only in rows where
    an edit has changed a bit.
    """

    def __init__(
        self,
        model: CausalLM,
        taps: Sequence[str] | Mapping[str, Where] = (),
        *,
        where: Where = EVERYWHERE,
        edits: Sequence[Edit] = (),
        observer: Observer | None = None,
        keeps_gradients: bool = False,
    ) -> None:
        """`taps` are names or patterns (probe.tap_names), of which the tokens at `where` are kept, or each with its
        own. With `keeps_gradients` what is kept is a part of the graph. Raises UsageError for a tap that is none."""
        chosen = dict(taps) if isinstance(taps, Mapping) else dict.fromkeys(taps, where)
        self._model = model
        self.sight = Sight(model.config, chosen, edits, observer=observer, keeps_gradients=keeps_gradients)
        for name in self.sight.edited:
            if name.endswith(READ_ONLY):
                raise UsageError(f"{name}: follows from other taps, so it is seen and cannot be changed")
        if any(edit.tap == "logits" and not edit.where.is_everything for edit in edits):
            raise UsageError("logits: the head is asked for rows whose tokens it does not know, so all are changed")
        self._handles: list[RemovableHandle] = []
        self._trunk_rows: BatchRows | None = None

    @property
    def captures(self) -> Captures:
        return self.sight.captures

    @property
    def num_hooks(self) -> int:
        """Those that the model has of this probe."""
        return len(self._handles)

    def __enter__(self) -> Self:
        model, sight = self._model, self.sight
        config = model.config
        layers = [*model.model.layers, *(() if model.mtp is None else model.mtp.layers)]
        for index, layer in enumerate(layers):
            prefix = prefix_of(config, index)
            if sight.observer is not None or any(name.startswith(f"{prefix}.") for name in sight.wanted):
                assert isinstance(layer, DecoderLayer)
                self._handles += LayerHooks(layer, prefix, sight).attach()
        self._attach_trunk()
        if model.mtp is not None:
            self._attach_mtp(model.mtp)
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach_trunk(self) -> None:
        model = self._model
        if {"embedding", "norm"} & self.sight.wanted:
            self._handles.append(model.model.register_forward_pre_hook(self._begin))
            self._handles.append(model.model.register_forward_hook(self._end))
        for name, module in (("embedding", model.model.embed_tokens), ("norm", model.model.norm)):
            if name in self.sight.wanted:
                self._handles.append(module.register_forward_hook(partial(self._show_trunk, name)))
        if "logits" in self.sight.wanted:
            self._handles.append(model.lm_head.register_forward_hook(self._show_logits))

    def _attach_mtp(self, mtp: nn.Module) -> None:
        parts = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "joined": "fc"}
        wanted = {f"mtp.{part}": mtp.get_submodule(name) for part, name in {**parts, "norm": "norm"}.items()}
        wanted = {tap: module for tap, module in wanted.items() if tap in self.sight.wanted}
        if wanted:
            self._handles.append(mtp.register_forward_pre_hook(self._begin_mtp))
            self._handles.append(mtp.register_forward_hook(self._end))
        for tap, module in wanted.items():
            self._handles.append(module.register_forward_hook(partial(self._show_trunk, tap)))

    def _begin(self, module: nn.Module, inputs: tuple[Batch]) -> None:
        self._trunk_rows = self.sight.rows_of(inputs[0])

    def _begin_mtp(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._trunk_rows = self.sight.rows_of(inputs[2])

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._trunk_rows = None  # embeddings are looked up for the MTP layer as well

    def _show_trunk(self, tap: str, module: nn.Module, inputs: Any, output_TD: Tensor) -> Tensor:
        return output_TD if self._trunk_rows is None else self.sight.show(tap, output_TD, self._trunk_rows)

    def _show_logits(self, module: nn.Module, inputs: Any, output_RY: Tensor) -> Tensor:
        return self.sight.show_rows("logits", output_RY)
