"""Stacks of experts in any form that is copied expert by expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qnext import ops


def tensors_of(stack: Tensor | ops.Weight) -> list[Tensor]:
    """All of a stack."""
    return [stack] if isinstance(stack, Tensor) else stack.tensors


def form_of(stack: Tensor | ops.Weight) -> tuple[object, ...]:
    """Equal for stacks that fit into each other's memory."""
    return type(stack), *((tensor.shape, tensor.dtype) for tensor in tensors_of(stack))


def stack_like(stack: Tensor | ops.Weight, num_experts: int, device: torch.device) -> Tensor | ops.Weight:
    """Memory on `device` for so many experts in the form of a stack. Raises TypeError for a form that has no copy."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty((num_experts, *tensor.shape[1:]), dtype=tensor.dtype, device=device)

    if isinstance(stack, Tensor):
        return like(stack)
    if isinstance(stack, ops.Fp8Weight):
        return ops.Fp8Weight(like(stack.codes), like(stack.scales), stack.block)
    if isinstance(stack, ops.QuantizedWeight):
        zeros = None if stack.zeros is None else like(stack.zeros)
        return replace(stack, codes=like(stack.codes), scales=like(stack.scales), zeros=zeros)
    raise TypeError(f"{type(stack).__name__} cannot be copied expert by expert")


def copy_expert(source: Tensor | ops.Weight, expert: int, target: Tensor | ops.Weight, place: int) -> None:
    """In the order of the device's work, so that whoever reads the place before has read it."""
    for of, to in zip(tensors_of(source), tensors_of(target), strict=True):
        to[place].copy_(of[expert], non_blocking=True)
