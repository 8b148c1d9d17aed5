"""Training on the bits of inference: an op computes what inference computes, and has the gradient of training.

A policy-gradient run compares log-probabilities of two computations, that of the engine and that of the trainer. Here
they are the same one: kernels make the forward, and torch makes the gradient from the same inputs.

On a GPU that holds op by op: decoding there computes some ops as one (`ops.normed_linears` and the like), which rounds
less.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_of_thread = threading.local()


@contextmanager
def inference_forward() -> Iterator[None]:
    """While this is open in a thread, calls with gradients have the results of calls without them.

    Their gradient is computed in backward, where the op runs again as in training. So a call keeps its inputs alone.
    """
    before = getattr(_of_thread, "is_on", False)
    _of_thread.is_on = True
    try:
        yield
    finally:
        _of_thread.is_on = before


def in_this_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, which computes in every later call as it would in this thread now: with `inference_forward`, or
    without."""
    if not getattr(_of_thread, "is_on", False):
        return function
    return inference_forward()(function)


def with_inference_forward(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """An op that obeys `inference_forward`. Its tensors may stand in records; it writes to none of them."""

    @wraps(op)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not getattr(_of_thread, "is_on", False) or not torch.is_grad_enabled():
            return op(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not places:
            return op(*args, **kwargs)
        out_spec: list[TreeSpec] = []
        outputs = _InferenceForward.apply(_BoundOp(op, leaves, spec, places), out_spec, *(leaves[n] for n in places))
        result: Result = tree_unflatten(list(outputs), out_spec[0])
        return result

    return call


class _BoundOp:
    """A call of an op with some of its tensors exchanged."""

    def __init__(self, op: Callable[..., Any], leaves: Sequence[Any], spec: TreeSpec, places: Sequence[int]) -> None:
        self._op, self._spec, self._places = op, spec, places
        self._leaves = list(leaves)
        for place in places:
            self._leaves[place] = None  # kept by autograd

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return self._op(*args, **kwargs)


class _InferenceForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _BoundOp, out_spec: list[TreeSpec], *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, spec = tree_flatten(call(tensors))  # autograd is off here
        out_spec.append(spec)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            outputs, _ = tree_flatten(ctx.call(tensors))
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        found = torch.autograd.grad([out for out, _ in pairs], tensors, [grad for _, grad in pairs], allow_unused=True)
        return None, None, *found
