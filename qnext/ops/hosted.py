"""Weights of experts that wait in the memory of the host, and are brought to the device that computes.

Legend: E experts, T tokens, A experts of a token.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qnext.ops.records import Routing
from qnext.ops.weights import Weight, dequantize


class BroughtExperts(NamedTuple):
    """Stacks on the device that have all experts of a call, at the places that `routing` names."""

    gate_up: Tensor | Weight
    down: Tensor | Weight
    routing: Routing


class BringsExperts(Protocol):
    """Who knows where the experts of a layer are."""

    def bring(self, routing: Routing, x_TD: Tensor | None = None, *, keeps_numbers: bool = False) -> BroughtExperts:
        """The experts of a call, valid until the next one. Waits for the device, which has chosen them.

        From what the experts are given, `x_TD`, those of the next layer may be guessed and copied ahead. With
        `keeps_numbers` each is at the place of its own number, for ops that have more of each expert.
        """

    @property
    def device(self) -> torch.device:
        """Where they are computed."""


class HostedWeight:
    """A stack [E, ...] in the memory of the host. `experts`, which it shares with another one, brings them."""

    def __init__(self, stack: Tensor | Weight, experts: BringsExperts) -> None:
        self.stack, self.experts = stack, experts

    @property
    def shape(self) -> torch.Size:
        return self.stack.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the host."""
        return [self.stack] if isinstance(self.stack, Tensor) else self.stack.tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of them, on the host."""
        return dequantize(self.stack, dtype)

    def to(self, device: torch.device | str) -> HostedWeight:
        """Itself. Raises ValueError for a device that is neither the host nor where its experts are computed."""
        if torch.device(device).type not in ("cpu", self.experts.device.type):
            raise ValueError(f"these experts are computed on {self.experts.device}, not on {device}")
        return self

    def __getitem__(self, expert: int) -> Tensor | Weight:
        """One matrix, on the device."""
        return self.stack[expert].to(self.experts.device)
