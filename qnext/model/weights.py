"""Weights that are no parameters, such as quantised ones, in the place of a module's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qnext.ops import RecordWeight, Residency, StreamedExperts, Weight

if TYPE_CHECKING:
    from typing_extensions import Self


class HoldsWeights(nn.Module):
    """A module that may hold a Weight in the place of a parameter, under the same name.

    torch sees only parameters and buffers. Here weights move with the module, `state_dict` holds each of their tensors
    as `<name>.<number>`, and named_weights finds them. A cast leaves them unchanged, because codes and scales have the
    types that kernels read. A `state_dict` fits a model whose weights have the same form in memory.
    """

    _weights: dict[str, Weight]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights = {}

    def __getattr__(self, name: str) -> Any:
        weights = self.__dict__.get("_weights")
        return weights[name] if weights and name in weights else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Weight):
            raise TypeError(f"a Weight as {name} needs set_weight: named_weights does not find an attribute")
        super().__setattr__(name, value)

    def set_weight(self, name: str, weight: nn.Parameter | Weight) -> None:
        """Put `weight` in the place of the parameter or weight `name`."""
        assert name in self._parameters or name in self._weights, name
        if isinstance(weight, nn.Parameter):
            self._weights.pop(name, None)
            self._parameters[name] = weight
        else:
            self._parameters.pop(name, None)
            self._weights[name] = weight

    def own_weights(self) -> Mapping[str, Weight]:
        """By name: the weights that are no parameters, without those of modules below."""
        return self._weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, weight in self._weights.items():
            self._weights[name] = weight.to(fn(torch.empty(0, device=weight.tensors[0].device)).device)
        return self

    def _own_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights.items():
            for number, tensor in enumerate(weight.tensors):
                yield f"{prefix}{name}.{number}", tensor

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self._own_tensors(prefix))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for key, tensor in self._own_tensors(prefix):
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if key not in state_dict:
                missing_keys.append(key)
                continue
            values = state_dict[key]
            if (values.shape, values.dtype) != (tensor.shape, tensor.dtype):
                error_msgs.append(f"{key}: {values.dtype} {list(values.shape)} does not fit {list(tensor.shape)}")
                continue
            tensor.copy_(values)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Every weight at and below `module` that is no parameter, by its full name, shared ones once."""
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        if isinstance(owner, HoldsWeights):
            for name, weight in owner.own_weights().items():
                if id(weight) not in seen:
                    seen.add(id(weight))
                    yield f"{prefix}.{name}" if prefix else name, weight


def residency_of(module: nn.Module) -> Residency | None:
    """What brings the experts of a model that are on disk; None where all are in memory."""
    for _, weight in named_weights(module):
        if isinstance(weight, RecordWeight) and isinstance(weight.records, StreamedExperts):
            return weight.records.residency
    return None


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that `module` keeps in memory: parameters, buffers, and the tensors of weights as
    `<name>.<number>`."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for name, weight in named_weights(module):
        for number, tensor in enumerate(weight.tensors):
            yield f"{name}.{number}", tensor


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, buffers and weights, shared ones once."""
    return sum(tensor.nbytes for _, tensor in named_tensors(module))
