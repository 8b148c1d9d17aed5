"""The hooks of a mixer: its fused op runs as ever, and its steps are computed beside it where they are wanted.

Where an edit changes a step, the rows from there on go on with what the steps make of it, and so do the caches.
Legend: T tokens, Z width of a mixer, X outputs of a projection.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnext import ops
from qnext.model import Batch
from qnext.model.attention import Attention
from qnext.model.delta_net import GatedDeltaNet
from qnext.probe import names
from qnext.probe.attending import Attended, attended, mixed_by, probabilities_of
from qnext.probe.edits import changed_rows
from qnext.probe.rows import BatchRows
from qnext.probe.scratch import copy_pages, copy_slots, put_pages, put_slots
from qnext.probe.sight import DeltaSeen, Sight
from qnext.probe.steps import Graft, Steps, delta_inputs, states_at, updates, walk


class MixerHooks:
    """What both kinds of mixers share."""

    kind: ClassVar[str]
    steps: ClassVar[tuple[str, ...]]
    projections: ClassVar[tuple[str, ...]]
    output: ClassVar[str]

    def __init__(self, mixer: nn.Module, prefix: str, sight: Sight) -> None:
        self._mixer, self._prefix, self._sight = mixer, f"{prefix}.{self.kind}", sight
        self._projected: dict[str, Tensor] = {}
        self._gated_TZ: Tensor | None = None  # as the fused op gave it
        self._rows: BatchRows | None = None

    @property
    def wants_steps(self) -> bool:
        """Whether the steps have to be computed."""
        inner = (f"{self._prefix}.{step}" for step in self.steps if step != "gated_out")
        gradients = self._sight.keeps_gradients and f"{self._prefix}.gated_out" in self._sight.wanted
        return self._sight.observes(self.kind) or gradients or any(tap in self._sight.wanted for tap in inner)

    @property
    def _wants_core_alone(self) -> bool:
        """Whether core_out is all that is wanted of the steps, and only looked at: the fused op gives it."""
        core, sight = f"{self._prefix}.core_out", self._sight
        inner = {f"{self._prefix}.{step}" for step in self.steps if step != "gated_out"}
        only_looks = core not in sight.edited and not sight.keeps_gradients and not sight.observes(self.kind)
        return only_looks and inner & sight.wanted == {core}

    @property
    def _needs_graph(self) -> bool:
        is_edited = any(f"{self._prefix}.{step}" in self._sight.edited for step in self.steps)
        return torch.is_grad_enabled() and (self._sight.keeps_gradients or is_edited)

    def attach(self) -> list[RemovableHandle]:
        handles = []
        if self.wants_steps or f"{self._prefix}.gated_out" in self._sight.wanted:
            handles.append(self._mixer.register_forward_pre_hook(self._before))
            out = self._mixer.get_submodule(self.output)
            handles.append(out.register_forward_pre_hook(self._before_output))
        if self.wants_steps:
            for name in self.projections:
                projection = self._mixer.get_submodule(name)
                handles.append(projection.register_forward_hook(partial(self._keep_projected, name)))
            handles.append(self._mixer.register_forward_hook(self._after))
        return handles

    def _keep_projected(self, name: str, module: nn.Module, inputs: Any, output_TX: Tensor) -> None:
        self._projected[name] = output_TX

    def _before_output(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert self._rows is not None
        self._gated_TZ = inputs[0]
        return (self._sight.show(f"{self._prefix}.gated_out", inputs[0], self._rows),)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._rows = self._sight.rows_of(inputs[1])

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output_TD: Tensor) -> Tensor:
        assert self._rows is not None
        fused_TZ = self._gated_TZ
        assert fused_TZ is not None
        if self._wants_core_alone:
            with torch.no_grad():
                core_THV = self._core(inputs)
            if core_THV is not None:
                self._sight.keep(f"{self._prefix}.core_out", core_THV, self._rows)
                return output_TD
        steps = Steps(self._prefix, self._rows, self._sight.show)
        with torch.set_grad_enabled(self._needs_graph):
            mixed_TZ = self._mix(steps, inputs)
        affected_T = steps.affected()
        follows = torch.is_grad_enabled() and (self._sight.keeps_gradients or steps.needs_gradient)
        if affected_T is None and not follows:
            return output_TD
        if affected_T is None:
            return module.get_submodule(self.output)(Graft.apply(fused_TZ, mixed_TZ))
        self._put(steps.carried_on(), inputs[1])
        base_TZ = Graft.apply(fused_TZ, mixed_TZ) if follows else fused_TZ
        redone_TD = module.get_submodule(self.output)(torch.where(affected_T[:, None], mixed_TZ, base_TZ))
        return redone_TD if follows else torch.where(affected_T[:, None], redone_TD, output_TD)

    def _mix(self, steps: Steps, inputs: tuple[Any, ...]) -> Tensor:
        raise NotImplementedError

    def _core(self, inputs: tuple[Any, ...]) -> Tensor | None:
        """core_out by the fused op, once more; None where it cannot be used."""
        raise NotImplementedError

    def _put(self, carried_T: Tensor, batch: Batch) -> None:
        """What these rows leave behind is that of the steps from now on."""
        raise NotImplementedError


class DeltaHooks(MixerHooks):
    kind, steps, output = "delta", names.DELTA_STEPS, "out_proj"
    projections = ("in_proj_qkvz", "in_proj_ba")
    _slots: ops.DeltaCache | None = None  # a copy
    _before_NHKV: Tensor | None = None
    _last_NHKV: Tensor | None = None  # where an edit has changed a state

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        super()._before(module, inputs)
        assert isinstance(module, GatedDeltaNet)
        batch: Batch = inputs[1]
        self._slots = self._before_NHKV = self._last_NHKV = None
        if batch.cache is not None and self.wants_steps:
            self._slots = copy_slots(batch.cache.delta_cache(module.layer_index))
            self._before_NHKV = ops.read_carried(self._slots, batch.packing).state_NHKV

    def _mix(self, steps: Steps, inputs: tuple[Any, ...]) -> Tensor:
        assert isinstance(self._mixer, GatedDeltaNet)
        qkvz_TX, ba_TY = (self._projected[name] for name in self.projections)
        mixed_TZ = self._mixer.mix(qkvz_TX, ba_TY, inputs[1].packing, self._slots, partial(self._see, steps))
        self._derive(steps)
        return mixed_TZ

    def _core(self, inputs: tuple[Any, ...]) -> Tensor | None:
        assert isinstance(self._mixer, GatedDeltaNet)
        qkvz_TX, ba_TY = (self._projected[name] for name in self.projections)
        return self._mixer.core(qkvz_TX, ba_TY, inputs[1].packing, self._slots)

    def _see(self, steps: Steps, step: str, x_T: Tensor) -> Tensor:
        """States come before core_out, which is what they are read for: one that changes changes all behind it."""
        tap = f"{self._prefix}.state"
        if step == "core_out" and tap in self._sight.edited:
            assert self._slots is None or self._slots.is_draft_N is None or not self._slots.is_draft_N.any(), tap
            walked = walk(delta_inputs(steps.seen), steps.rows, self._before_NHKV, self._sight.edits_of(tap))
            if walked is not None:
                x_T = steps.replace("state", walked.o_THV.to(x_T.dtype), walked.changed_T)
                self._last_NHKV = walked.state_NHKV
        return steps(step, x_T)

    def _derive(self, steps: Steps) -> None:
        """What no step has: updates, and states after chosen tokens."""
        sight, rows, before = self._sight, steps.rows, self._before_NHKV
        inputs = delta_inputs(steps.seen)
        if (tap := f"{self._prefix}.update") in sight.wanted:
            sight.keep(tap, updates(inputs, rows.packing, before), rows)
        sight.keep_made(f"{self._prefix}.state", rows, partial(states_at, inputs, rows, initial_NHKV=before))
        if sight.observer is not None and sight.observes(self.kind):
            after = None if self._slots is None else self._slots.state
            seen = DeltaSeen(inputs, steps.seen, before, after)
            sight.observer.see_delta(self._prefix.rpartition(".")[0], rows, seen)

    def _put(self, carried_T: Tensor, batch: Batch) -> None:
        if batch.cache is not None and self._slots is not None:
            assert isinstance(self._mixer, GatedDeltaNet)
            sequences_S = batch.packing.sequence_ids_T[carried_T].unique()
            if self._last_NHKV is not None:
                self._slots.state.copy_(self._last_NHKV)
            put_slots(self._slots, batch.cache.delta_cache(self._mixer.layer_index), sequences_S)


class AttentionHooks(MixerHooks):
    kind, steps, output = "attention", names.ATTENTION_STEPS, "o_proj"
    projections = ("q_proj", "k_proj", "v_proj")

    _pages: ops.AttentionCache | None = None

    def _mix(self, steps: Steps, inputs: tuple[Any, ...]) -> Tensor:
        assert isinstance(self._mixer, Attention)
        _, batch, rope = inputs
        if batch.cache is not None:
            self._pages = copy_pages(batch.cache.attention_cache(self._mixer.layer_index), batch.packing)
        q_TX, k_TY, v_TY = (self._projected[name] for name in self.projections)
        mixed_TZ = self._mixer.mix(q_TX, k_TY, v_TY, rope, batch.packing, self._pages, partial(self._see, steps))
        if self._sight.observer is not None and self._sight.observes(self.kind):
            prefix = self._prefix.rpartition(".")[0]
            self._sight.observer.see_attention(prefix, steps.rows, self._attended(steps), steps.seen)
        return mixed_TZ

    def _core(self, inputs: tuple[Any, ...]) -> Tensor | None:
        assert isinstance(self._mixer, Attention)
        _, batch, rope = inputs
        cache = None if batch.cache is None else batch.cache.attention_cache(self._mixer.layer_index)
        q_TX, k_TY, v_TY = (self._projected[name] for name in self.projections)
        return self._mixer.core(q_TX, k_TY, v_TY, rope, batch.packing, cache)

    def _attended(self, steps: Steps) -> list[Attended]:
        assert isinstance(self._mixer, Attention)
        return attended(steps.seen, steps.rows.packing, self._pages, self._mixer.scale)

    def _see(self, steps: Steps, step: str, x_T: Tensor) -> Tensor:
        """Probabilities come before core_out, which is computed from them where they change."""
        tap, sight = f"{self._prefix}.probabilities", self._sight
        if step != "core_out" or tap not in sight.wanted:
            return steps(step, x_T)
        found = self._attended(steps)
        if tap not in sight.edited:
            sight.keep_made(tap, steps.rows, partial(probabilities_of, found, steps.rows))
            return steps(step, x_T)
        before_THS = probabilities_of(found, steps.rows, torch.arange(len(x_T), device=x_T.device))
        after_THS = sight.show(tap, before_THS, steps.rows)
        if after_THS is not before_THS:
            mixed_THK = mixed_by(after_THS, found, steps.rows.packing).to(x_T.dtype)
            x_T = steps.replace("probabilities", mixed_THK, changed_rows(before_THS, after_THS))
        return steps(step, x_T)

    def _put(self, carried_T: Tensor, batch: Batch) -> None:
        if batch.cache is not None and self._pages is not None:
            assert isinstance(self._mixer, Attention)
            rows_R = carried_T.nonzero().flatten()
            put_pages(self._pages, batch.cache.attention_cache(self._mixer.layer_index), rows_R)
