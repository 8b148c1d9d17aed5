"""Native calls of one computation, kept to be made again on the same memory: what a captured graph is on a GPU."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qnext.ops.backend import native

Result = TypeVar("Result")

_EMPTY, _EMPTY_LIKE = torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default


class Recording:
    """Makes the calls of a computation again, without Python in between.

    They read and write the memory that they used the first time: whoever replays has put new input where the old one
    lay, and finds the result where the first one is. What lies between the two belongs to the recording.
    """

    def __init__(self, calls: Any, memory: list[Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._calls = calls
        self._memory = memory
        # Of any of them the address, or that of its copy in fp32, may stand in a call.
        self._stamps = [
            (parameter, parameter._version, parameter.data_ptr())
            for parameter in parameters
            if not parameter.is_inference()
        ]

    @property
    def num_bytes(self) -> int:
        """Memory that is the recording's own."""
        return sum(block.nbytes for block in self._memory)

    def is_current(self) -> bool:
        """Whether no parameter has changed or moved since."""
        return all(p._version == version and p.data_ptr() == address for p, version, address in self._stamps)

    def replay(self) -> None:
        """The same calls once more. Raises what they raise, IndexError for instance."""
        self._calls.replay()


def record(
    compute: Callable[[], Result], *, parameters: Iterable[nn.Parameter] = ()
) -> tuple[Result, Recording | None]:
    """The result of `compute` and, where native calls alone made it, how to make it again.

    None for the recording says that torch computed a part, which no replay would repeat: a reference implementation,
    or a conversion that is made on first use. `parameters` are those that `compute` reads.
    """
    calls = native().Recording()
    witness = _Witness()
    calls.start()
    try:
        with witness:
            result = compute()
    finally:
        calls.stop()
    return result, None if witness.has_computed else Recording(calls, witness.blocks, parameters)


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
