"""Reading weights that stay codes. Legend: F outputs, D inputs, G groups of inputs with a scale."""

from __future__ import annotations

import triton
import triton.language as tl

from qnext.ops.triton import forms

FLOATS = tl.constexpr(forms.FLOATS)
FP8 = tl.constexpr(forms.FP8)
INT4 = tl.constexpr(forms.INT4)


@triton.jit
def codes_at(
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    expert,
    at_F,
    first,
    num_outputs,
    num_inputs,
    FORM: tl.constexpr,
):
    """Of the inputs `first + [0, BLOCK_D)` of some outputs: codes less their zeros [F, G, GROUP], and scales [F, G].

    FORM is the kind of the codes, HAS_ZEROS, the outputs and the inputs (GROUP) that share a scale, and BLOCK_D. Floats
    come as they are, with scales of one. In widths that none fills, and behind the last input, codes are zero.
    """
    KIND: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[3]
    BLOCK_D: tl.constexpr = FORM[4]
    NUM_GROUPS: tl.constexpr = BLOCK_D // GROUP
    at_D, at_G = first + tl.arange(0, BLOCK_D), first // GROUP + tl.arange(0, NUM_GROUPS)
    is_in_F = at_F < num_outputs
    is_in_FD = is_in_F[:, None] & (at_D < num_inputs)[None, :]
    row_F = expert * num_outputs + at_F
    if KIND == INT4:
        at_FD = row_F[:, None] * (num_inputs // 2) + (at_D // 2)[None, :]
        bytes_FD = tl.load(weight_ptr + at_FD, mask=is_in_FD, other=0)
        codes_FD = ((bytes_FD >> ((at_D % 2) * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32)
    else:
        at_FD = row_F[:, None] * num_inputs + at_D[None, :]
        codes_FD = tl.load(weight_ptr + at_FD, mask=is_in_FD, other=0.0).to(tl.float32)
    codes_FGD = tl.reshape(codes_FD, [codes_FD.shape[0], NUM_GROUPS, GROUP])
    scales_FG = tl.full([codes_FD.shape[0], NUM_GROUPS], 1.0, tl.float32)
    if KIND != FLOATS:
        num_groups = tl.cdiv(num_inputs, GROUP)
        of_expert = tl.cdiv(num_outputs, FORM[2])
        scale_at = (expert * of_expert + at_F // FORM[2])[:, None] * num_groups + at_G[None, :]
        is_in_FG = is_in_F[:, None] & (at_G < num_groups)[None, :]
        scales_FG = tl.load(scales_ptr + scale_at, mask=is_in_FG, other=0.0).to(tl.float32)
        if KIND != FP8:
            zeros_FG = tl.full([codes_FD.shape[0], NUM_GROUPS], 8.0 if KIND == INT4 else 128.0, tl.float32)
            if FORM[1]:
                zeros_FG = tl.load(zeros_ptr + scale_at, mask=is_in_FG, other=0).to(tl.float32)
            codes_FGD = tl.where(tl.reshape(is_in_FD, codes_FGD.shape), codes_FGD - zeros_FG[:, :, None], 0.0)
    return codes_FGD, scales_FG
