"""The hooks of a sparse feed-forward: its router, its experts one by one, its shared expert.

Legend: T tokens, D hidden, E experts, A experts of a token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnext import ops
from qnext.errors import UsageError
from qnext.model import RouterOutput, SparseMoE
from qnext.model.moe import Experts
from qnext.probe import names
from qnext.probe.edits import changed_rows
from qnext.probe.rows import BatchRows
from qnext.probe.sight import Sight
from qnext.probe.steps import Graft

_PARTS = ("experts.inner", "experts.out", "shared.inner", "shared.out", "shared.gate")


class SparseHooks:
    """`rows` gives those of the call that runs."""

    def __init__(self, moe: SparseMoE, prefix: str, sight: Sight, rows: Callable[[], BatchRows]) -> None:
        self._moe, self._prefix, self._sight, self._rows = moe, prefix, sight, rows
        self._routing: ops.Routing | None = None
        if self._wants("experts.inner") and type(moe.experts) is not Experts:
            raise UsageError(f"{prefix}.experts.inner: the experts have an adapter, of which only results are seen")

    def attach(self) -> list[RemovableHandle]:
        handles = []
        if self._wants(*(f"router.{step}" for step in names.ROUTER_STEPS), *_PARTS):
            handles.append(self._moe.gate.register_forward_hook(self._after_router, with_kwargs=True))
        if self._wants(*_PARTS):
            handles.append(self._moe.register_forward_hook(self._after))
        return handles

    def _wants(self, *parts: str) -> bool:
        return any(f"{self._prefix}.{part}" in self._sight.wanted for part in parts)

    def _show(self, part: str, x_T: Tensor) -> Tensor:
        return self._sight.show(f"{self._prefix}.{part}", x_T, self._rows())

    def _after_router(
        self, module: nn.Module, inputs: Any, options: dict[str, Any], output: RouterOutput
    ) -> RouterOutput:
        logits_TE = self._show("router.logits", output.logits_TE)
        if logits_TE is not output.logits_TE:
            output = self._chosen(logits_TE, options.get("chosen_TA"), output, options.get("load_E"))
        if self._wants("router.probabilities"):
            self._sight.keep(f"{self._prefix}.router.probabilities", logits_TE, self._rows(), _probabilities)
        experts_TA = self._show("router.experts", output.routing.experts_TA)
        if experts_TA is not output.routing.experts_TA:
            output = self._chosen(logits_TE, experts_TA, output, options.get("load_E"))
        weights_TA = self._show("router.weights", output.routing.weights_TA)
        if weights_TA is not output.routing.weights_TA:
            output = output._replace(routing=output.routing._replace(weights_TA=weights_TA))
        self._routing = output.routing
        return output

    def _chosen(
        self, logits_TE: Tensor, chosen_TA: Tensor | None, before: RouterOutput, load_E: Tensor | None
    ) -> RouterOutput:
        """The choice from other logits, or another choice. The counts are those of the new one."""
        if load_E is not None:
            load_E -= before.routing.experts_TA.flatten().bincount(minlength=len(load_E))
        return self._moe.gate.choose(logits_TE, load_E=load_E, chosen_TA=chosen_TA)

    def _after(self, module: nn.Module, inputs: tuple[Tensor], output_TD: Tensor) -> Tensor | None:
        x_TD, routing, changes = inputs[0], self._routing, _Changes(self._show)
        assert routing is not None
        needs_graph = torch.is_grad_enabled() and (self._sight.keeps_gradients or bool(self._sight.edited))
        with torch.set_grad_enabled(needs_graph):
            routed_TD, shared_TD = self._see_experts(x_TD, routing, changes), self._see_shared(x_TD, changes)
            if changes.rows_T is None and not (needs_graph and (self._sight.keeps_gradients or changes.needs_gradient)):
                return None
            total_TD = self._total(x_TD, routing, routed_TD, shared_TD)
        if needs_graph:
            output_TD = Graft.apply(output_TD.detach(), total_TD)
        return output_TD if changes.rows_T is None else torch.where(changes.rows_T[:, None], total_TD, output_TD)

    def _total(self, x_TD: Tensor, routing: ops.Routing, routed_TD: Tensor | None, shared_TD: Tensor | None) -> Tensor:
        if routed_TD is None:
            routed_TD = self._moe.experts(x_TD, routing)
        if self._moe.shared_expert is None:
            return routed_TD
        if shared_TD is None:
            shared_TD = torch.sigmoid(self._moe.shared_expert_gate(x_TD)) * self._moe.shared_expert(x_TD)
        return ops.add(routed_TD, shared_TD)

    def _see_experts(self, x_TD: Tensor, routing: ops.Routing, changes: _Changes) -> Tensor | None:
        """The sum of the routed experts, where their parts are wanted."""
        if not self._wants("experts.inner", "experts.out"):
            return None
        outputs_TAD = None
        if self._wants("experts.inner"):
            inner_TAF = self._moe.experts.inner(x_TD, routing.experts_TA)
            seen_TAF = changes.show("experts.inner", inner_TAF)
            if seen_TAF is not inner_TAF or self._sight.keeps_gradients:
                outputs_TAD = self._moe.experts.outputs(seen_TAF, routing.experts_TA)
        if outputs_TAD is None:
            outputs_TAD = self._each(x_TD, routing)
        outputs_TAD = changes.show("experts.out", outputs_TAD)
        return (routing.weights_TA[..., None].to(outputs_TAD.dtype) * outputs_TAD).sum(1)

    def _each(self, x_TD: Tensor, routing: ops.Routing) -> Tensor:
        """[T, A, D]: what each expert of a token gives, by the op that computes them together."""
        one_T1 = torch.ones_like(routing.weights_TA[:, :1])
        alone = (ops.Routing(one_T1, each_T1.contiguous()) for each_T1 in routing.experts_TA.split(1, dim=1))
        return torch.stack([self._moe.experts(x_TD, each) for each in alone], 1)

    def _see_shared(self, x_TD: Tensor, changes: _Changes) -> Tensor | None:
        """What the shared expert adds, where its parts are wanted."""
        mlp = self._moe.shared_expert
        if mlp is None or not self._wants("shared.inner", "shared.out", "shared.gate"):
            return None
        out_TD = changes.show("shared.out", mlp.down_proj(changes.show("shared.inner", mlp.inner(x_TD))))
        return torch.sigmoid(changes.show("shared.gate", self._moe.shared_expert_gate(x_TD))) * out_TD


def _probabilities(logits_TE: Tensor) -> Tensor:
    return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).softmax(-1)


class _Changes:
    """Which rows are not what they would have been."""

    def __init__(self, show: Callable[[str, Tensor], Tensor]) -> None:
        self._show = show
        self.rows_T: Tensor | None = None
        self.needs_gradient = False

    def show(self, part: str, x_T: Tensor) -> Tensor:
        after_T = self._show(part, x_T)
        if after_T is not x_T:
            self.needs_gradient |= after_T.requires_grad
            changed_T = changed_rows(x_T, after_T)
            if changed_T.any():
                self.rows_T = changed_T if self.rows_T is None else self.rows_T | changed_T
        return after_T
