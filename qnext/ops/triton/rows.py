"""RMSNorm of rows and angles of positions by GPU kernels. Legend: T tokens, D the normalised dim, R rotated dims."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.checks import check_norm
from qnext.ops.records import Rope
from qnext.ops.reference.rope import rope_frequencies
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.train_rows import MAX_ROW, NormForm, normed, trained_rms_norm
from qnext.ops.triton.trust import compared, is_trusted, numbers, run_on, take, train, wants_gradients


def serves_rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> bool:
    """Whether a program can hold a row."""
    if not 0 < x.shape[-1] <= MAX_ROW or x.numel() == 0:
        return False
    if wants_gradients(x, weight_D):
        return train(x, weight_D) and is_trusted(try_rms_norm_gradient, x.device)
    return take(x, weight_D) and is_trusted(try_rms_norm, x.device)


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, zero_centered: bool) -> Tensor:
    """See ops.rms_norm. Computed in fp32 and cast once."""
    check_norm(x, weight_D)
    if wants_gradients(x, weight_D):
        return trained_rms_norm(x, weight_D, eps=eps, zero_centered=zero_centered)
    return normed(x, weight_D, NormForm(eps, zero_centered))


def try_rms_norm(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(3, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        wanted = reference.rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered)
        yield rms_norm(x_TD, weight_D, eps=1e-6, zero_centered=zero_centered), wanted


def try_rms_norm_gradient(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    x_TD, weight_D = numbers(70, 72, seed=0, device=device), numbers(72, seed=1, device=device, scale=0.2)
    for zero_centered in (True, False):
        norm: dict[str, Any] = {"eps": 1e-6, "zero_centered": zero_centered}
        yield from compared(partial(rms_norm, **norm), partial(reference.rms_norm, **norm), x_TD, weight_D)


def serves_rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> bool:
    """Whether the frequencies are fp32, as they always are."""
    is_angles = frequencies.dtype == torch.float32 and len(positions_T) > 0
    return is_angles and run_on(positions_T.device) and is_trusted(try_rope_cos_sin, positions_T.device)


def rope_cos_sin(positions_T: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> Rope:
    """See ops.rope_cos_sin. Angles are fp64."""
    from qnext.ops.triton.kernels.rope import rope_kernel

    half = len(frequencies)
    shape = (len(positions_T), half)
    rope = Rope(*(torch.empty(shape, dtype=torch.float32, device=positions_T.device) for _ in range(2)))
    block = next_power_of_2(half)
    rope_kernel[(len(positions_T),)](
        positions_T.contiguous(), frequencies.contiguous(), *rope, attention_factor, half, BLOCK=block, num_warps=1
    )
    return rope


def try_rope_cos_sin(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """At the start, and where an angle in fp32 would have no correct digit."""
    positions_T = torch.tensor([0, 1, 1_000_003], device=device)
    frequencies = rope_frequencies(12, theta=1e7).to(device)
    ours = rope_cos_sin(positions_T, frequencies, attention_factor=1.25)
    yield from zip(ours, reference.rope_cos_sin(positions_T, frequencies, attention_factor=1.25), strict=True)
