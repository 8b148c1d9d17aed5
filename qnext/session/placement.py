"""On which device a model is computed. No other code decides it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from qnext.errors import NotSupported, UsageError

if TYPE_CHECKING:
    import torch

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
_FORM = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


class Wanted(NamedTuple):
    """A device as users name it, and what a model asks of it: bytes of the weights there, and whether experts get a
    part of its memory, the others of which wait elsewhere."""

    device: str
    weight_bytes: Callable[[torch.device], int]
    streams_experts: bool = False


def check_device(name: str) -> None:
    """Raises UsageError for a name that is none, and for a device that is not there."""
    if _FORM.fullmatch(name) is None:
        raise UsageError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if name in (AUTO, CPU):
        return
    count, number = _num_devices(), int(name.partition(":")[2] or 0)
    if not count:
        raise UsageError(f"--device {name}: torch finds no CUDA device here; --device cpu computes without one")
    if number >= count:
        raise UsageError(f"--device {name}: there are {count} CUDA devices, the last is cuda:{count - 1}")


def choose_device(wanted: Wanted) -> torch.device:
    """For a model in this process. `auto` takes the first CUDA device where one computes and the weights fit there, and
    else the CPU; so does a model whose experts get a part of the memory. Raises UsageError as check_device."""
    import torch

    from qnext.engine.memory import free_bytes
    from qnext.ops import cuda_computes
    from qnext.planning.plan import weights_fit

    check_device(wanted.device)
    if wanted.device == AUTO:
        first = torch.device(CUDA, 0)
        serves = cuda_computes() and not wanted.streams_experts
        return first if serves and weights_fit(wanted.weight_bytes(first), free_bytes(first)) else torch.device(CPU)
    if wanted.device == CPU:
        return torch.device(CPU)
    return torch.device(CUDA, int(wanted.device.partition(":")[2] or 0))


def kind_on_ranks(wanted: Wanted, *, num_local: int) -> str:
    """Cpu or cuda, for all of the ranks, of which `num_local` are on this machine. Raises UsageError where they are
    more than the CUDA devices that are asked for, and as check_device; NotSupported for a part of their memory for
    experts."""
    from qnext.ops import cuda_computes

    name = wanted.device
    check_device(name)
    if name == AUTO:
        return CUDA if cuda_computes() and _num_devices() >= num_local and not wanted.streams_experts else CPU
    if name == CPU:
        return CPU
    if name != CUDA:
        raise UsageError(f"--device {name}: each rank takes the CUDA device of its own number; --device cuda")
    if wanted.streams_experts:
        raise NotSupported("--expert-memory: on ranks experts wait on disk for the CPU, not for a GPU; --device cpu")
    if _num_devices() < num_local:
        raise UsageError(f"--device cuda: {num_local} ranks on this machine, but {_num_devices()} CUDA devices")
    return CUDA


def device_of_rank(kind: str, local_rank: int) -> torch.device:
    """That of the rank with this number among those of its machine."""
    import torch

    return torch.device(CUDA, local_rank) if kind == CUDA else torch.device(CPU)


def use_device(device: torch.device) -> None:
    """Make it the device on which this thread starts kernels."""
    import torch

    if device.type == CUDA:
        torch.cuda.set_device(device)


def _num_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
