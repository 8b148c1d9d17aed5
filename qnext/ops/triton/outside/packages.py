"""Which packages are asked on a device, and which of them is trusted there."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from qnext.ops.backends import package_may_serve
from qnext.ops.triton.trust import reason_against, run_on

TOLERANCE = 2e-2  # relative RMS: operands and results are bf16, and errors enter sums
# Tokens of the longest sequence of a call from which on the kernels for prompts are asked: a chunk of theirs. No token
# that decodes and no draft is part of such a call.
MIN_PIECE = 64
_HOPPER = 9  # major compute capability

Call = TypeVar("Call")


class Package(NamedTuple):
    name: str  # one of backends.PACKAGES
    module: str  # that has its kernels


def first_trusted(
    what: str,
    packages: Sequence[Package],
    make: Callable[[str, Any], Call],
    self_test: Callable[[Call, torch.device], Iterable[tuple[Tensor, Tensor]]],
    device: torch.device,
) -> Call | None:
    """`what` of the first package that is installed, may serve and passes its self-test on `device`.

    `make` takes a package's name and its module. A package that does not pass is named in one warning.
    """
    for package in packages if run_on(device) else ():
        if not package_may_serve(package.name) or importlib.util.find_spec(package.module.split(".")[0]) is None:
            continue
        try:
            with torch.inference_mode(False):  # what it keeps is written again in and outside of inference
                call = make(package.name, importlib.import_module(package.module))
            reason = reason_against(partial(self_test, call), device, TOLERANCE)
        except Exception as failure:  # whatever another program's import may raise
            reason = f"cannot be imported ({type(failure).__name__}: {failure})"
        if not reason:
            return call
        warnings.warn(f"{what} of {package.name} {reason}; another serves", RuntimeWarning, stacklevel=3)
    return None


def is_for_hopper(device: torch.device) -> bool:
    """Whether kernels written for Hopper run on `device`. The CPU is there for tests."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == _HOPPER
