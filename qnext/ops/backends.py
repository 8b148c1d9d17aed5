"""Backends: the facts about each that callers may ask for, and the choice between them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

BACKEND_VARIABLE = "QNEXT_BACKEND"
_TORCH_NAMES = ("torch", "reference")  # the second is the older one
PACKAGES_VARIABLE = "QNEXT_PACKAGES"
PACKAGES = ("flash-qla", "flash-linear-attention", "flashinfer")  # whose kernels may serve beside those of ops/triton


@dataclass(frozen=True)
class Backend:
    """The facts that callers may rely on for inference on a device. Code outside qnext.ops does not ask which backend
    runs."""

    name: str
    activation_dtype: torch.dtype | None  # of activations, whatever bf16 or fp32 weights are; None: that of the weights
    # A row has the same bits wherever its sequence is cut and whatever else is in the batch, as far as this backend
    # serves the model: sizes and forms of weights that it does not take are computed by torch (see CausalLM).
    is_cut_invariant: bool
    # Tokens of a step that is worth recording: in longer ones the time of Python does not count, but the memory does.
    # 0 where steps cannot be recorded (see qnext.ops.record).
    max_recorded_tokens: int
    pads_recordings: bool  # a recording is dear, so that batches are filled up to few sizes
    mixes_lengths: bool  # single tokens and longer pieces go well in one batch
    copies_context: bool  # attention gathers the keys and values of a sequence, in fp32
    workspace_factor: int  # times the tensors of planning.step_bytes
    fuses_gradients: bool  # training in fp32 has fused kernels, and that under autocast has none

    @property
    def can_record(self) -> bool:
        return self.max_recorded_tokens > 0


CPU = Backend(
    "cpu",
    activation_dtype=torch.float32,
    is_cut_invariant=True,
    max_recorded_tokens=64,
    pads_recordings=False,
    mixes_lengths=True,
    copies_context=False,
    workspace_factor=1,
    fuses_gradients=True,
)
# Its operations make several tensors where a kernel makes none, and it has paths of its own for single tokens.
TORCH = Backend(
    "torch",
    activation_dtype=None,
    is_cut_invariant=False,
    max_recorded_tokens=0,
    pads_recordings=False,
    mixes_lengths=False,
    copies_context=True,
    workspace_factor=2,
    fuses_gradients=False,
)


# What its kernels do not serve is torch's, in the same dtype: so far that decides how it stands beside torch. A graph
# saves the time of starting some twenty kernels a layer. Training has the same kernels in fp32 and under autocast.
TRITON = Backend(
    "triton",
    activation_dtype=None,
    is_cut_invariant=False,
    max_recorded_tokens=256,
    pads_recordings=True,
    mixes_lengths=False,
    copies_context=False,
    workspace_factor=2,
    fuses_gradients=False,
)

# Its kernels on the CPU, for tests: there is no graph to capture.
INTERPRETED = replace(TRITON, max_recorded_tokens=0, pads_recordings=False)


def backend_of(device: torch.device) -> Backend:
    """The backend of inference on `device`. Calls that it does not serve go to torch, above all most of those
    with gradients."""
    if device.type == "cpu" and cpu_kernels() is not None:
        return CPU
    if not triton_serves(device.type):
        return TORCH
    return INTERPRETED if device.type == "cpu" else TRITON


def package_may_serve(name: str) -> bool:
    """Whether kernels of this package, one of PACKAGES, may serve where they are installed.

    QNEXT_PACKAGES names those that may, with commas between them, or is `none`. Where it is empty, all of them may.
    Raises ValueError for an unknown name there.
    """
    return name in _named_packages()


def reads_fp8(device: torch.device) -> bool:
    """Whether kernels on `device` multiply with weights in fp8 as they are. GPUs before compute capability 8.9 know no
    such numbers."""
    is_new = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    return backend_of(device).name == "triton" and is_new


def _wanted() -> str:
    """The backend that the environment demands; empty where it demands none.

    Raises ValueError for an unknown one, and where GPU kernels are demanded that cannot run.
    """
    wanted = os.environ.get(BACKEND_VARIABLE, "")
    if wanted not in ("", "cpu", "triton", *_TORCH_NAMES):
        raise ValueError(f"{BACKEND_VARIABLE} must be 'cpu', 'torch' (also 'reference') or 'triton', not {wanted!r}")
    if wanted == "triton" and not torch.cuda.is_available() and not is_interpreted():
        raise ValueError(f"{BACKEND_VARIABLE}=triton needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)")
    _named_packages()  # a wrong name is told where a process starts, not where it first meets a prompt
    return wanted


def _named_packages() -> Sequence[str]:
    """Those that the environment lets serve. Raises ValueError for an unknown one."""
    wanted = os.environ.get(PACKAGES_VARIABLE, "")
    named = [] if wanted == "none" else [name.strip() for name in wanted.split(",")]
    for name in named if wanted else ():
        if name not in PACKAGES:
            raise ValueError(f"{PACKAGES_VARIABLE} must be 'none' or names among {', '.join(PACKAGES)}, not {name!r}")
    return named if wanted else PACKAGES


def cuda_computes() -> bool:
    """Whether inference may go to a CUDA device: torch finds one, and QNEXT_BACKEND demands nothing that runs on the
    CPU."""
    wanted = _wanted()
    return torch.cuda.is_available() and wanted != "cpu" and not (wanted == "triton" and is_interpreted())


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU. Raises ImportError where Triton is missing."""
    return bool(importlib.import_module("triton.knobs").runtime.interpret)


@cache
def triton_serves(device_type: str) -> bool:
    """Whether GPU kernels run for tensors on devices of that type: on CUDA devices where Triton is installed.

    On the CPU they run where QNEXT_BACKEND=triton demands it and Triton's interpreter is on; that is for tests. Raises
    what `cpu_kernels` raises, and ImportError where QNEXT_BACKEND=triton demands what is not installed.
    """
    wanted = _wanted()
    if device_type == "cpu":
        return wanted == "triton" and is_interpreted()
    if device_type != "cuda" or wanted not in ("", "triton"):
        return False
    if wanted == "triton":
        importlib.import_module("triton")
    return importlib.util.find_spec("triton") is not None


@cache
def cpu_kernels() -> ModuleType | None:
    """The compiled kernels, or None where they were not built or QNEXT_BACKEND forbids them.

    One warning says that they are missing. Raises ValueError for an unknown value of the variable, and ImportError
    where QNEXT_BACKEND=cpu demands kernels that are missing.
    """
    wanted = _wanted()
    if wanted not in ("", "cpu"):
        return None
    try:
        module = importlib.import_module("qnext.ops.cpu._native")
    except ImportError as error:
        if wanted == "cpu":
            raise
        warnings.warn(
            f"native CPU kernels are not available ({error}); PyTorch serves, slower", RuntimeWarning, stacklevel=2
        )
        return None
    module.set_num_threads(torch.get_num_threads())
    return module


def instruction_set() -> str | None:
    """The instruction set of the kernels that run; None where none run."""
    module = cpu_kernels()
    return None if module is None else str(module.isa())


def arithmetic_of(device: torch.device) -> str:
    """What the bits of a result depend on beside weights and code: the instruction set, or torch's version and
    device."""
    backend = backend_of(device)
    if backend is CPU:
        return f"native {instruction_set()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    kernels = ""
    if backend.name == "triton":
        kernels = f"triton {importlib.metadata.version('triton')} {_flashinfer()}"
    return f"{kernels}torch {torch.__version__} {name}"


def _flashinfer() -> str:
    """Its version and a space, where its kernels may compute a part of prompts."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"flashinfer {version} " if package_may_serve("flashinfer") else ""


def activation_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the activations of a model with the embedding table `weight`: the backend's, or the table's for
    gradients."""
    wide = backend_of(weight.device).activation_dtype
    wants_grad = torch.is_grad_enabled() and weight.requires_grad
    return weight.dtype if wide is None or wants_grad or weight.dtype != torch.bfloat16 else wide


def set_num_threads(count: int) -> None:
    """Set the number of threads of torch and of the kernels."""
    torch.set_num_threads(count)
    module = cpu_kernels()
    if module is not None:
        module.set_num_threads(count)


def compute_alone() -> None:
    """What the calling thread asks torch and the kernels for is done by it alone from now on.

    For threads that share work among themselves.
    """
    module = cpu_kernels()  # found first: it takes as many threads as torch has then
    torch.set_num_threads(1)  # holds for the calling thread
    if module is not None:
        module.compute_alone()
