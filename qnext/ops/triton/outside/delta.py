"""The gated delta rule of other packages on rows in bf16: in chunks of 64 tokens on the units of Hopper for bf16.

In training, flash-qla or flash-linear-attention, with gradients. For pieces of prompts, flashinfer, with states. Steps
have nothing to gain: where flash-linear-attention has a kernel each for convolution, norm and recurrence, one kernel
of ours computes all of them with one pass over the states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaOutput, DeltaWeights
from qnext.ops.torch.delta import gated_delta_rule as wide_rule
from qnext.ops.torch.norm import l2_norm
from qnext.ops.triton.outside.packages import MIN_PIECE, Package, first_trusted, is_for_hopper
from qnext.ops.triton.trust import compared, numbers

# By preference. Both have chunk_gated_delta_rule with the arguments of OutsideRule.
TRAINING_PACKAGES = (Package("flash-qla", "flash_qla"), Package("flash-linear-attention", "fla.ops.gated_delta_rule"))
PROMPT_PACKAGES = (Package("flashinfer", "flashinfer.gdn_prefill"),)
_HEAD_DIM = 128  # of keys and values: flashinfer has no other
_WHAT = "the gated delta rule"


class OutsideRule(NamedTuple):
    """With gradients, as flash-qla and flash-linear-attention have it."""

    package: str
    function: Callable[..., Any]

    def __call__(
        self, inputs: DeltaInputs, *, packing: Packing, initial_state_NHKV: Tensor | None = None
    ) -> DeltaOutput:
        """See ops.gated_delta_rule. The output is bf16; gradients reach all inputs and the initial state."""
        q_1TJK, k_1TJK, v_1THV = (x.to(torch.bfloat16).contiguous()[None] for x in inputs[:3])
        g_1TH, beta_1TH = (x.float().contiguous()[None] for x in inputs[3:])
        o_1THV, state_NHKV = self.function(
            q_1TJK,
            k_1TJK,
            v_1THV,
            g_1TH,
            beta_1TH,
            scale=inputs.k_TJK.shape[2] ** -0.5,
            initial_state=None if initial_state_NHKV is None else initial_state_NHKV.float().contiguous(),
            output_final_state=True,
            cu_seqlens=packing.cu_seqlens,
        )
        return DeltaOutput(o_1THV[0], state_NHKV)


class PromptRule(NamedTuple):
    """Without gradients, as flashinfer has it: decays are factors, states lie [N, H, V, K]."""

    package: str
    function: Callable[..., Any]

    def __call__(
        self,
        inputs: DeltaInputs,
        *,
        packing: Packing,
        initial_state_NHKV: Tensor | None = None,
        use_cp: bool | str = "auto",
    ) -> DeltaOutput:
        """See ops.gated_delta_rule. The output is bf16, the state fp32.

        With `use_cp` a sequence is cut into parts that are computed side by side; "auto" does so where few sequences
        and heads leave processors without work.
        """
        q_TJK, k_TJK, v_THV = (x.to(torch.bfloat16).contiguous() for x in inputs[:3])
        state_NHVK = None if initial_state_NHKV is None else initial_state_NHKV.float().transpose(2, 3).contiguous()
        o_THV, state_NHVK = self.function(
            q_TJK,
            k_TJK,
            v_THV,
            g=inputs.g_TH.float().exp().contiguous(),
            beta=inputs.beta_TH.float().contiguous(),
            scale=_HEAD_DIM**-0.5,
            initial_state=state_NHVK,
            output_final_state=True,
            cu_seqlens=packing.cu_seqlens,
            use_cp=use_cp,
            max_seqlen=packing.max_length,
        )
        return DeltaOutput(o_THV, state_NHVK.transpose(2, 3))


@cache
def training_rule(device: torch.device) -> OutsideRule | None:
    """The rule of another package that serves training in bf16 on `device`. Asked once."""
    return first_trusted(
        _WHAT,
        TRAINING_PACKAGES,
        lambda package, module: OutsideRule(package, module.chunk_gated_delta_rule),
        _try_training,
        device,
    )


def fits_prompt_rule(rows: Tensor, weights: DeltaWeights, packing: Packing) -> bool:
    """Whether a call is a piece of a prompt of the dtype and sizes that flashinfer takes."""
    has_sizes = weights.key_head_dim == weights.value_head_dim == _HEAD_DIM and packing.max_length >= MIN_PIECE
    return has_sizes and rows.dtype == torch.bfloat16


@cache
def prompt_rule(device: torch.device) -> PromptRule | None:
    """The rule of another package that serves pieces of prompts on `device`. Asked once."""
    if not is_for_hopper(device):
        return None
    return first_trusted(
        _WHAT,
        PROMPT_PACKAGES,
        lambda package, module: PromptRule(package, module.chunk_gated_delta_rule),
        _try_prompts,
        device,
    )


class _Trial(NamedTuple):
    """Heads of 128 dims, two of values for each of keys; a sequence of more than a chunk, and a short one."""

    packing: Packing
    inputs: DeltaInputs
    initial_state_NHKV: Tensor

    @staticmethod
    def on(device: torch.device) -> _Trial:
        inputs = DeltaInputs(
            l2_norm(numbers(79, 1, _HEAD_DIM, seed=0, device=device)),
            l2_norm(numbers(79, 1, _HEAD_DIM, seed=1, device=device)),
            numbers(79, 2, _HEAD_DIM, seed=2, device=device),
            -numbers(79, 2, seed=3, device=device, scale=0.5).abs(),
            numbers(79, 2, seed=4, device=device).sigmoid(),
        )
        states = numbers(2, 2, _HEAD_DIM, _HEAD_DIM, seed=5, device=device, scale=0.1)
        return _Trial(Packing([70, 9], device=device), inputs, states)


def _try_training(rule: OutsideRule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Results and gradients."""
    packing, inputs, initial_state_NHKV = _Trial.on(device)

    def of(delta: Callable[..., DeltaOutput], *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.float() for y in delta(DeltaInputs(*x[:5]), packing=packing, initial_state_NHKV=x[5]))

    yield from compared(partial(of, rule.__call__), partial(of, wide_rule), *inputs, initial_state_NHKV)


def _try_prompts(rule: PromptRule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """From states and from zeros, by the program for few heads and by that for many."""
    packing, inputs, states_NHKV = _Trial.on(device)
    for initial_state_NHKV in (states_NHKV, None):
        wanted = wide_rule(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV)
        for use_cp in ("auto", False):
            found = rule(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV, use_cp=use_cp)
            yield from zip(found, wanted, strict=True)
