"""Several backward passes at once on the CPU, each on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from qnext import ops


class HasTotal(Protocol):
    """Something with a loss to differentiate."""

    @property
    def total(self) -> Tensor: ...


Loss = TypeVar("Loss", bound=HasTotal)


class BackwardThreads:
    """Runs tasks side by side and divides torch's own threads among them.

    The operations of a model of a few million parameters are too short to divide well among cores. Whole micro batches
    need no division. Two at once on two cores made a step about a tenth faster (docs/log.md). Gradients are added in
    the order of the tasks, so results do not depend on which thread is faster.
    """

    def __init__(self, num_threads: int) -> None:
        assert num_threads >= 1
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads)

    def backward(self, tasks: Sequence[Callable[[], Loss]], parameters: Sequence[nn.Parameter]) -> list[Loss]:
        """Call the tasks, differentiate `total` of their results, and add the gradients to those of the parameters."""
        total_threads = torch.get_num_threads()
        share = max(1, total_threads // self.num_threads)

        def run(task: Callable[[], Loss]) -> tuple[Loss, tuple[Tensor | None, ...]]:
            if share == 1:
                ops.compute_alone()
            else:
                torch.set_num_threads(share)  # holds for the calling thread
            loss = task()
            return loss, torch.autograd.grad(loss.total, parameters, allow_unused=True)

        try:
            done = list(self._pool.map(run, tasks))
        finally:
            torch.set_num_threads(total_threads)
        for _, gradients in done:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is None:
                    continue
                if parameter.grad is not None:
                    parameter.grad.add_(gradient)
                elif gradient.stride() == parameter.stride():
                    parameter.grad = gradient
                else:  # fused optimisers walk parameter and gradient by the same strides
                    parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return [loss for loss, _ in done]

    def close(self) -> None:
        self._pool.shutdown()
