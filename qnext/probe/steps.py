"""A mixer computed once more, step by step, beside the fused op: what lies between the steps, seen and changed.

Legend: T tokens, N sequences, H value or query heads, G KV heads, J key heads, K and V head dims, S keys of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qnext import ops
from qnext.probe.edits import Edit, changed_rows
from qnext.probe.rows import BatchRows

Show = Callable[[str, Tensor, BatchRows], Tensor]  # a tap, its tensor, whose rows -> what takes its place


# What later tokens of a sequence read as well; the other steps are those of a token alone.
_CARRIED = frozenset({"conv", "key", "value", "beta", "decay", "state"})


@dataclass
class Steps:
    """The `see` of a mixer whose steps are computed once more; knows which rows are not what they would have been."""

    prefix: str
    rows: BatchRows
    show: Show

    def __post_init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self.changed_T: Tensor | None = None
        self.carried_T: Tensor | None = None  # rows whose change is carried to later ones
        self.needs_gradient = False

    def __call__(self, step: str, x_T: Tensor) -> Tensor:
        if step == "gated_out":  # is seen where the output projection takes it
            return x_T
        after_T = self.show(f"{self.prefix}.{step}", x_T, self.rows)
        if after_T is not x_T:
            self.replace(step, after_T, changed_rows(x_T, after_T))
        self.seen[step] = after_T
        return after_T

    def replace(self, step: str, after_T: Tensor, changed_T: Tensor) -> Tensor:
        """`after_T`, of which these rows are new."""
        self.needs_gradient |= after_T.requires_grad
        if changed_T.any():
            self.changed_T = changed_T if self.changed_T is None else self.changed_T | changed_T
            if step in _CARRIED:
                self.carried_T = changed_T if self.carried_T is None else self.carried_T | changed_T
        return after_T

    def affected(self) -> Tensor | None:
        """[T] whether a row was changed, or one before it that it reads."""
        if self.changed_T is None or self.carried_T is None:
            return self.changed_T
        return self.changed_T | self.carried_on()

    def carried_on(self) -> Tensor:
        """[T] whether what a row leaves behind was changed."""
        if self.carried_T is None:
            return torch.zeros(self.rows.packing.num_tokens, dtype=torch.bool, device=self.rows.packing.device)
        parts = self.carried_T.long().split(self.rows.packing.lengths)
        return torch.cat([part.cumsum(0) > 0 for part in parts])


class Graft(torch.autograd.Function):
    """The values of one tensor with the gradient of another, which was computed in another order."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def delta_inputs(seen: dict[str, Tensor]) -> ops.DeltaInputs:
    return ops.DeltaInputs(*(seen[step] for step in ("query", "key", "value", "decay", "beta")))


def updates(inputs: ops.DeltaInputs, packing: ops.Packing, initial_NHKV: Tensor | None) -> Tensor:
    """u [T, H, V] of ops.gated_delta_rule: what each token adds to the state along its key, in parallel over chunks.

    Before each token another is put that only fades the state and reads it at the key: u = beta (v - what it reads).
    """
    wide = torch.promote_types(inputs.v_THV.dtype, torch.float32)
    q_TJK, k_TJK, v_THV, g_TH, beta_TH = (x.to(wide) for x in inputs)
    doubled = ops.DeltaInputs(
        torch.stack([k_TJK, q_TJK], 1).flatten(0, 1),
        torch.stack([k_TJK, k_TJK], 1).flatten(0, 1),
        torch.stack([torch.zeros_like(v_THV), v_THV], 1).flatten(0, 1),
        torch.stack([g_TH, torch.zeros_like(g_TH)], 1).flatten(0, 1),
        torch.stack([torch.zeros_like(beta_TH), beta_TH], 1).flatten(0, 1),
    )
    twice = ops.Packing([2 * length for length in packing.lengths], device=packing.device)
    o, _ = ops.gated_delta_rule(doubled, packing=twice, initial_state_NHKV=initial_NHKV)
    read_THV = o[::2] * k_TJK.shape[-1] ** 0.5
    return beta_TH[..., None] * (v_THV - read_THV)


def states_at(inputs: ops.DeltaInputs, rows: BatchRows, chosen_R: Tensor, *, initial_NHKV: Tensor | None) -> Tensor:
    """[R, H, K, V]: the state after each chosen token, in the order of the rows."""
    found: list[Tensor] = []

    def keep(row: int, state_1HKV: Tensor) -> Tensor:
        found.append(state_1HKV)
        return state_1HKV

    _walk(inputs, rows, chosen_R, initial_NHKV, keep)
    order_R = chosen_R.argsort().argsort()
    return torch.cat(found).index_select(0, order_R)


class Walked(NamedTuple):
    o_THV: Tensor
    state_NHKV: Tensor
    changed_T: Tensor


def walk(inputs: ops.DeltaInputs, rows: BatchRows, initial_NHKV: Tensor | None, edits: Sequence[Edit]) -> Walked | None:
    """The delta rule with states that are changed on the way; None where no edit changes one."""
    everyone_T = torch.arange(rows.packing.num_tokens, device=rows.packing.device)
    choices = [rows.chosen(edit.where) for edit in edits]
    chosen = [set((everyone_T if choice is None else choice).tolist()) for choice in choices]
    changed_T = torch.zeros(len(everyone_T), dtype=torch.bool, device=rows.packing.device)

    def change(row: int, state_1HKV: Tensor) -> Tensor:
        for edit, its_rows in zip(edits, chosen, strict=True):
            if row in its_rows:
                after_1HKV = edit.of_rows(state_1HKV)
                changed_T[row] |= after_1HKV is not state_1HKV
                state_1HKV = after_1HKV
        return state_1HKV

    stops_R = torch.tensor(sorted(set().union(*chosen)), dtype=torch.long, device=rows.packing.device)
    o_THV, state_NHKV = _walk(inputs, rows, stops_R, initial_NHKV, change)
    return Walked(o_THV, state_NHKV, changed_T) if changed_T.any() else None


def _walk(
    inputs: ops.DeltaInputs,
    rows: BatchRows,
    stops_R: Tensor,
    initial_NHKV: Tensor | None,
    at_stop: Callable[[int, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The delta rule in pieces: after each stop it goes on from the state that `at_stop` gives."""
    stops, device = sorted(stops_R.tolist()), rows.packing.device
    outputs: list[Tensor] = []
    lasts: list[Tensor] = []
    begin = 0
    for n, length in enumerate(rows.packing.lengths):
        end = begin + length
        state_1HKV = None if initial_NHKV is None else initial_NHKV[n : n + 1]
        own = [row for row in stops if begin <= row < end]
        for stop in own if own and own[-1] == end - 1 else [*own, end - 1]:
            piece = ops.DeltaInputs(*(x[begin : stop + 1] for x in inputs))
            packing = ops.Packing([stop + 1 - begin], device=device)
            o_THV, state_1HKV = ops.gated_delta_rule(piece, packing=packing, initial_state_NHKV=state_1HKV)
            state_1HKV = at_stop(stop, state_1HKV) if stop in own else state_1HKV
            outputs.append(o_THV)
            begin = stop + 1
        assert state_1HKV is not None
        lasts.append(state_1HKV)
    return torch.cat(outputs), torch.cat(lasts)
