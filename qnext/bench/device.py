"""A bench on a GPU: which device it takes, and the limits that are published of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from qnext.bench.files import FLOAT_SCHEMES
from qnext.errors import UsageError
from qnext.planning.accelerators import accelerator_named
from qnext.session.folder import ModelFolder, weight_bytes_on
from qnext.session.placement import AUTO, CPU, Wanted, choose_device

_LOADED = ("float32", "bfloat16")  # what weights become on a GPU, unless they stay as they are


def bench_device(folder: ModelFolder, schemes: Sequence[str], peers: Sequence[str], *, stored: str) -> str:
    """The device of all `schemes`: as the folder asks for; `auto` is the CPU beside peers, and where one scheme does
    not go to a GPU. `stored` is the scheme of the folder as it is. Raises UsageError for what a GPU does not do."""
    dtypes = {scheme: None if scheme == stored else FLOAT_SCHEMES.get(scheme) for scheme in schemes}
    if folder.device == CPU:
        return CPU
    narrow = [scheme for scheme, dtype in dtypes.items() if dtype not in (None, *_LOADED)]
    if folder.device == AUTO and (peers or narrow):
        return CPU
    if peers:
        raise UsageError(f"--peer {peers[0]}: peers compute on the CPU, and --device is {folder.device}; --device cpu")
    if narrow:
        raise UsageError(f"--scheme {narrow[0]}: on {folder.device} weights become f32 or bf16, or stay as they are")
    devices = {
        str(
            choose_device(
                Wanted(folder.device, partial(weight_bytes_on, folder, dtype), folder.expert_memory is not None)
            )
        )
        for dtype in dtypes.values()
    }
    return devices.pop() if len(devices) == 1 else CPU


def describe_device(device: str) -> dict[str, Any]:
    """`device`, and its `device_name` where it is a GPU."""
    is_gpu = torch.device(device).type == "cuda"
    return {"device": device, **({"device_name": torch.cuda.get_device_name(device)} if is_gpu else {})}


def published_limits(device_name: str | None) -> dict[str, Any]:
    """The same keys as what is measured of a CPU, and the `source`. None stands for what is not known of a GPU: shares
    of it are left out. Dense products of bf16 are what weights of any scheme but f32 may become."""
    found = None if device_name is None else accelerator_named(device_name)
    return {
        "read_bytes_per_second": None if found is None else found.bandwidth,
        "operations_per_second": {"float32": None, "bfloat16": None if found is None else found.bf16},
        "native_kernels": None,
        "source": None if found is None else found.source,
    }
