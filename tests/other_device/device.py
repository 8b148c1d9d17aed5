"""A second device that computes on the processor: its tensors hold tensors of the CPU, and mixing both is an error.

It stands for a GPU where there is none. Code that forgets to move a tensor fails on it as on a GPU, and its numbers are
those of PyTorch on the CPU, bit for bit. `OtherDevice` counts what would make a program wait for a GPU.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from qnext.model import CausalLM

NAME = "other"
_ASKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default}
_SIZED_BY_VALUES = {
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_consecutive.default,
}


class _Module:
    """What PyTorch asks the module `torch.<name>` of a device."""

    def device_count(self) -> int:
        return 1

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are made on the CPU."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def other_device() -> torch.device:
    """The device. PyTorch keeps it for the rest of the process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    return torch.device(NAME, 0)


class _OtherTensor(Tensor):
    """A tensor there. `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OtherTensor:
        made: _OtherTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=other_device(),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with OtherDevice():
            return func(*args, **(kwargs or {}))


def moved(model: CausalLM) -> CausalLM:
    """A copy of a model there. Tensors of another class become new parameters, so a tied head is tied again."""
    there = copy.deepcopy(model).to(other_device())
    if there.config.tie_word_embeddings:
        there.lm_head.weight = there.model.embed_tokens.weight
    return there


class _Literals(TorchFunctionMode):
    """What PyTorch does where no dispatch mode sees it: numbers of Python become a tensor, and a tensor numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and wanted is not None and torch.device(wanted).type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(wanted)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], _OtherTensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part).to(NAME) if isinstance(part, list) else part for part in index)
            return func(args[0], index, *args[2:])
        if func in (Tensor.numpy, Tensor.tolist) and isinstance(args[0], _OtherTensor):
            if func is Tensor.numpy and not kwargs.get("force"):
                raise TypeError(f"numpy: the tensor is on {NAME}")
            return func(args[0].cpu(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def _enter_no_grad(mode: Any) -> None:
    """Tensors of inference mode cannot hold others."""
    mode.no_grad = torch.no_grad()
    mode.no_grad.__enter__()


def _exit_no_grad(mode: Any, *failure: Any) -> None:
    mode.no_grad.__exit__(*failure)


class OtherDevice(TorchDispatchMode):
    """While it is open, tensors can be made on the other device. `num_reads` counts the copies to the CPU and the sizes
    that depend on numbers there: a GPU's queue would have to run empty for each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self._literals = _Literals()

    def __enter__(self) -> OtherDevice:
        self._literals.__enter__()
        self._inference = torch.inference_mode.__enter__, torch.inference_mode.__exit__
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = _enter_no_grad, _exit_no_grad
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = self._inference
        self._literals.__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        has_other = any(isinstance(leaf, _OtherTensor) for leaf in leaves)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == NAME:
            kwargs["device"] = torch.device("cpu")
            return _made_there(func(*_held(args), **_held(kwargs)))
        if not has_other:
            return func(*args, **kwargs)
        is_copied_here = func is torch.ops.aten.copy_.default and not isinstance(args[0], _OtherTensor)
        leaves_it = is_copied_here or wanted is not None or func is torch.ops.aten._local_scalar_dense.default
        _check_together(func, leaves)
        self.num_reads += leaves_it or func in _ASKS or func in _SIZED_BY_VALUES
        out = func(*_held(args), **_held(kwargs))
        if leaves_it:
            return out
        return _again(func, out, args, kwargs)


def _held(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, _OtherTensor) else leaf, tree)


def _made_there(tree: Any) -> Any:
    return tree_map(lambda leaf: _OtherTensor(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _again(func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """The results there. What an op changed in place is the tensor that it was given."""
    given = {id(leaf.held): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _OtherTensor)}

    def there(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return given[id(leaf)] if id(leaf) in given else _OtherTensor(leaf)

    return tree_map(there, out)


def _check_together(func: Any, leaves: list[Tensor]) -> None:
    """As on a GPU: copies and numbers without dims may come from the CPU, nothing else may."""
    if func is torch.ops.aten.copy_.default:
        return
    for leaf in leaves:
        if not isinstance(leaf, _OtherTensor) and leaf.dim():
            raise RuntimeError(f"{func}: a tensor of {list(leaf.shape)} is on the CPU, others are on {NAME}")
