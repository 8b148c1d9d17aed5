"""Calls of one computation, recorded and repeated on the same memory: native ones here, on a GPU those of a graph."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qnext.ops.backends import cpu_kernels
from qnext.ops.cuda_graph import capture

Result = TypeVar("Result")

_version_of = attrgetter("_version")
_EMPTY, _EMPTY_LIKE = torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default


class Recording(Protocol):
    """Repeats the calls of a computation, without Python in between.

    The calls read and write the memory that they used the first time. Before a replay, put new input where the old
    input was. The result is where the first result was. The memory in between belongs to the recording.
    """

    @property
    def num_bytes(self) -> int:
        """Bytes that belong to the recording."""

    def replay(self) -> None:
        """Make the same calls once more. Raises what they raise, for instance IndexError."""


class _NativeCalls:
    """The recording of native calls."""

    def __init__(self, calls: Any, memory: list[Tensor]) -> None:
        self._calls = calls
        self._memory = memory

    @property
    def num_bytes(self) -> int:
        return sum(block.nbytes for block in self._memory)

    def replay(self) -> None:
        self._calls.replay()


class ParameterWatch:
    """Notices when parameters change or move. The calls of a recording may contain the address of a parameter or of its
    fp32 copy."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        # Those of inference mode have no version, and nothing may change them.
        self._parameters = [parameter for parameter in parameters if not parameter.is_inference()]
        self._versions, self._addresses = self._look()
        self._num_changes = 0

    def num_changes(self) -> int:
        """How often a change was found. A recording made at another number has to be made again."""
        versions, addresses = self._look()
        if versions != self._versions or addresses != self._addresses:
            self._versions, self._addresses = versions, addresses
            self._num_changes += 1
        return self._num_changes

    def _look(self) -> tuple[list[int], list[int]]:
        return list(map(_version_of, self._parameters)), list(map(Tensor.data_ptr, self._parameters))


def record(compute: Callable[[], Result], device: torch.device) -> tuple[Result, Recording | None]:
    """The result of `compute` on `device` and a recording, made while it runs once: of native calls, or a CUDA graph.

    The recording is None where no replay would repeat a part: on the CPU what torch computes, on a GPU what needs the
    host, and on both a conversion that is made on first use. The weights that it reads must not change: see
    ParameterWatch.
    """
    if device.type == "cuda":
        return capture(compute, device)
    module = cpu_kernels()
    assert module is not None, "ask Backend.can_record first"
    calls = module.Recording()
    witness = _Witness()
    calls.start()
    try:
        with witness:
            result = compute()
    finally:
        calls.stop()
    return result, None if witness.has_computed else _NativeCalls(calls, witness.blocks)


class _Witness(TorchDispatchMode):
    """Sees every operation of torch: gives memory to new tensors, notes whether anything was computed.

    Memory of a tensor that has died serves later ones, as it will when the calls are made again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []
        self.has_computed = False
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks. Skipping its compiler would mean importing it: 70 MB and a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _EMPTY or func is _EMPTY_LIKE:
            shape, default = (args[0], torch.get_default_dtype()) if func is _EMPTY else (args[0].shape, args[0].dtype)
            return self._allocate(shape, kwargs.get("dtype") or default)
        out = func(*args, **kwargs)
        if func.is_view:
            for leaf in tree_leaves(out):
                leaf._viewed = args[0]  # a view keeps the memory of what it shows
        else:
            self.has_computed = True
        return out

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = -(-max(1, math.prod(shape)) * dtype.itemsize // 64) * 64
        free = self._free[size]
        if not free:
            free.append(torch.empty(size, dtype=torch.uint8))
            self.blocks.append(free[-1])
        block = free.pop()
        tensor = block[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        weakref.finalize(tensor, free.append, block)
        return tensor
