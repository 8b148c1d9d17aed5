"""Whether an op keeps a row's bits: wherever its sequence is cut, and whatever else is computed beside it.

Kernels do and PyTorch does not, so sizes and forms of the weights decide it. It is said of calls without gradients on
activations of the backend's own width (`Backend.activation_dtype`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnext.ops import cpu
from qnext.ops.backends import cpu_kernels
from qnext.ops.records import AttentionWeights, DeltaWeights
from qnext.ops.weights import Weight


def linear_keeps_bits(weight_FD: Tensor | Weight) -> bool:
    return cpu_kernels() is not None and cpu.fits_linear(weight_FD)


def experts_keep_bits(gate_up_E2FD: Tensor | Weight, down_EDF: Tensor | Weight) -> bool:
    return cpu_kernels() is not None and cpu.fits_experts(gate_up_E2FD, down_EDF)


def attention_keeps_bits(weights: AttentionWeights) -> bool:
    return cpu_kernels() is not None and cpu.fits_attention_mixer(weights)


def delta_keeps_bits(weights: DeltaWeights) -> bool:
    return cpu_kernels() is not None and cpu.fits_gated_delta_mixer(weights)


def caches_keep_bits(kv_dtype: torch.dtype, num_draft_tokens: int) -> bool:
    """Whether both mixers do with pages of that type and so many pending tokens of a sequence."""
    return cpu_kernels() is not None and cpu.fits_pages(kv_dtype) and cpu.fits_drafts(num_draft_tokens)
