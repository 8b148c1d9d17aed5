"""Steps on a CUDA device as graphs: captured once, then started as one, on the same memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

_log = logging.getLogger("qnext.ops")
_READ_BY_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class CapturedGraph(NamedTuple):
    """A graph, and the bytes that it has beside those of the graphs before it: all share one pool of memory."""

    graph: Any  # torch.cuda.CUDAGraph
    num_bytes: int

    def replay(self) -> None:
        """Start the same kernels once more. Nothing is waited for."""
        self.graph.replay()


class _Workshop(NamedTuple):
    """Where the graphs of a device are made: a stream that runs nothing else, and the pool of their memory."""

    stream: torch.cuda.Stream
    pool: Any


@cache
def _workshop(device: torch.device) -> _Workshop:
    return _Workshop(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


def capture(compute: Callable[[], Result], device: torch.device) -> tuple[Result, CapturedGraph | None]:
    """The result of `compute`, which runs once, and a graph of it, which writes later results to the same memory.

    None stands for a computation that no graph repeats: it brings numbers to the host or from there, or the driver
    refuses it. What is done once, such as compiling a kernel, is done before the capture.
    """
    shop, current = _workshop(device), torch.cuda.current_stream(device)
    witness = HostTraffic()
    shop.stream.wait_stream(current)
    with torch.cuda.stream(shop.stream), witness:
        result = compute()
    current.wait_stream(shop.stream)
    if witness.first is not None:
        _log.debug("a step is not captured: %s needs the host", witness.first)
        return result, None
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_allocated(device)
    try:
        # Other threads copy prefixes meanwhile: what they do is no part of the graph.
        with torch.cuda.graph(graph, pool=shop.pool, stream=shop.stream, capture_error_mode="thread_local"):
            captured = compute()
    except RuntimeError as error:
        _log.warning("a step cannot be captured as a CUDA graph: %s", str(error).splitlines()[0])
        return result, None
    with torch.inference_mode():  # which the results may come from
        for place, values in zip(tree_leaves(captured), tree_leaves(result), strict=True):
            if place is not values:  # the capture computed nothing
                place.copy_(values)
    return captured, CapturedGraph(graph, max(0, torch.cuda.memory_allocated(device) - before))


class HostTraffic(TorchDispatchMode):
    """Sees every operation of torch, and keeps the name of the `first` for which host and device exchange numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks. Skipping its compiler would mean importing it: 70 MB and a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.first is None and any(tag in func.tags for tag in _READ_BY_HOST):
            self.first = str(func)
        out = func(*args, **(kwargs or {}))
        if self.first is None:
            # A number without a dimension is an argument of the kernel, as Python's numbers are.
            found = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor) and leaf.dim())
            if len({leaf.device.type for leaf in found}) > 1:
                self.first = str(func)
        return out
