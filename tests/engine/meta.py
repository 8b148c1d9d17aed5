"""The meta device in the place of a GPU: it has no numbers, and kernels only count their starts there."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qnext.ops import backends

META = torch.device("meta")
_ONLY_MEMORY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)


class Launched:
    """Stands for a kernel: counts its starts, whose tensors must all be on the device."""

    def __init__(self, name: str, starts: list[str]) -> None:
        self._name, self._starts = name, starts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid), (self._name, grid)

        def start(*arguments: Any, **constants: Any) -> None:
            tensors = [each for each in (*arguments, *constants.values()) if isinstance(each, Tensor)]
            assert tensors and all(tensor.device == META for tensor in tensors), self._name
            self._starts.append(self._name)

        return start


class TorchStarts(TorchDispatchMode):
    """Adds to `starts` every operation of torch that computes or copies: on a GPU each starts a kernel, at least."""

    def __init__(self, starts: list[str]) -> None:
        super().__init__()
        self._starts = starts

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_shown = func.is_view and all(_memory(leaf) == _memory(args[0]) for leaf in tree_leaves(out))
        if not is_shown and func not in _ONLY_MEMORY:
            self._starts.append(str(func))
        return out


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def launch_nothing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are started from now on, on a device that runs and trusts all of them."""
    found: list[str] = []
    serves = backends.triton_serves
    monkeypatch.setattr(backends, "triton_serves", lambda kind: kind == META.type or serves(kind))
    for wrappers in _modules_of("qnext.ops.triton"):
        if hasattr(wrappers, "is_trusted"):
            monkeypatch.setattr(wrappers, "is_trusted", lambda *_: True)
    for kernels in _modules_of("qnext.ops.triton.kernels"):
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Launched(name, found))
    return found


def _modules_of(package: str) -> list[ModuleType]:
    """The files of a package."""
    places = importlib.import_module(package).__path__
    found = [each.name for each in pkgutil.iter_modules(places) if not each.ispkg]
    return [importlib.import_module(f"{package}.{name}") for name in found]
