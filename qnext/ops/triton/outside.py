"""Kernels of other programs for the gated delta rule on rows in bf16, where they are installed (the extra `gpu`).

The first of PACKAGES that gives the reference's numbers on a device, forward and gradient, computes training there: in
chunks of 64 tokens on the units of Hopper for bf16. Our own kernel serves all else: rows in fp32, states, inference.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaOutput
from qnext.ops.torch.delta import gated_delta_rule as wide_rule
from qnext.ops.torch.norm import l2_norm
from qnext.ops.triton.trust import compared, numbers, reason_against, run_on

# By preference. Both have chunk_gated_delta_rule with the arguments of _call.
PACKAGES = (("flash-qla", "flash_qla"), ("flash-linear-attention", "fla.ops.gated_delta_rule"))
_TOLERANCE = 2e-2  # relative RMS: operands and results are bf16, and errors enter sums


class OutsideRule(NamedTuple):
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


@cache
def outside_rule(device: torch.device) -> OutsideRule | None:
    """The rule of another program that serves training in bf16 on `device`. Asked once.

    A package that is installed and does not pass is named in one warning.
    """
    for package, module in PACKAGES if run_on(device) else ():
        if importlib.util.find_spec(module.split(".")[0]) is None:
            continue
        try:
            rule = OutsideRule(package, importlib.import_module(module).chunk_gated_delta_rule)
            reason = reason_against(partial(_try_rule, rule), device, _TOLERANCE)
        except Exception as failure:  # whatever another program's import may raise
            reason = f"cannot be imported ({type(failure).__name__}: {failure})"
        if not reason:
            return rule
        warnings.warn(f"the gated delta rule of {package} {reason}; another serves", RuntimeWarning, stacklevel=2)
    return None


def _try_rule(rule: OutsideRule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Heads of 128 dims, two of values for each of keys; a sequence of more than a chunk, and a short one; states."""
    packing = Packing([70, 9], device=device)
    inputs = (
        l2_norm(numbers(79, 1, 128, seed=0, device=device)),
        l2_norm(numbers(79, 1, 128, seed=1, device=device)),
        numbers(79, 2, 128, seed=2, device=device),
        -numbers(79, 2, seed=3, device=device, scale=0.5).abs(),
        numbers(79, 2, seed=4, device=device).sigmoid(),
        numbers(2, 2, 128, 128, seed=5, device=device, scale=0.1),
    )

    def of(delta: Callable[..., DeltaOutput], *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.float() for y in delta(DeltaInputs(*x[:5]), packing=packing, initial_state_NHKV=x[5]))

    yield from compared(partial(of, rule.__call__), partial(of, wide_rule), *inputs)
