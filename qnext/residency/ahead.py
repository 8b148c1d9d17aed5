"""Copies of experts to a device before their layer has asked for them, beside what the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qnext import ops
from qnext.residency.stacks import copy_expert, stack_like, tensors_of

NUM_PLACES = 4  # experts of a layer that are copied ahead at most: what a bus copies while a layer is computed
NUM_LIKELY = 6  # experts that are guessed of each token; some are in slots
# As the kernels have it for experts on disk (residency.cpp): calls of so many tokens guess; below this share of right
# guesses one call of so many does; an observation has this weight.
_MOST_TOKENS, _LEAST_SHARE_RIGHT, _CALLS_OF_TRIAL, _NEWEST = 4, 0.4, 64, 1 / 64


class CopiesAhead:
    """Room for the guessed experts of one layer, which all layers of a model share, and the stream of their copies.

    A CUDA device copies on a stream of its own, another device in the order of its work. What a layer asks for is
    moved into its slots, and the rest is forgotten: a wrong guess drives nothing out. `stacks` have the form of the
    experts of every layer.
    """

    def __init__(self, stacks: Sequence[Tensor | ops.Weight], device: torch.device) -> None:
        self._device = device
        self._room = tuple(stack_like(stack, NUM_PLACES, device) for stack in stacks)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: list[torch.cuda.Event] = []
        if self._stream is not None:
            self._arrived = [torch.cuda.Event() for _ in range(NUM_PLACES)]
            for tensor in (tensor for stack in self._room for tensor in tensors_of(stack)):
                tensor.record_stream(self._stream)
        self._owner: object = None
        self._place_of: dict[int, int] = {}
        self._share_right, self._num_calls = 1.0, 0

    def is_worth_it(self, num_tokens: int) -> bool:
        """Whether a call of so many tokens guesses."""
        if num_tokens > _MOST_TOKENS:
            return False
        self._num_calls += 1
        return self._share_right >= _LEAST_SHARE_RIGHT or self._num_calls % _CALLS_OF_TRIAL == 0

    def begin(self, owner: object, host: Sequence[Tensor | ops.Weight], experts: Sequence[int]) -> int:
        """Copy the first of these experts of a layer, its `owner`, into the room. How many.

        They come behind all that the device was asked for before, such as copies that another layer waits for.
        """
        self._owner = owner
        self._place_of = {expert: place for place, expert in enumerate(experts[:NUM_PLACES])}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._beside():
            for expert, place in self._place_of.items():
                for of, to in zip(host, self._room, strict=True):
                    copy_expert(of, expert, to, place)
                if self._stream is not None:
                    self._arrived[place].record(self._stream)
        return len(self._place_of)

    def settle(self, owner: object, asked: Sequence[int]) -> dict[int, int]:
        """Where in the room those experts are that a layer asks for. The others are forgotten."""
        guessed, self._place_of = self._place_of, {}
        found = {expert: place for expert, place in guessed.items() if owner is self._owner and expert in asked}
        for expert in guessed:
            self._share_right += _NEWEST * ((expert in found) - self._share_right)
        return found

    def move(self, place: int, to: Sequence[Tensor | ops.Weight], slot: int) -> None:
        """From the room into a slot, in the order of the device's work, once the copy has arrived."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[place])
        for of, there in zip(self._room, to, strict=True):
            copy_expert(of, place, there, slot)

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
