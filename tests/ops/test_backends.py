"""Who runs: native kernels, or the reference where they are missing, forbidden or not fit."""

from __future__ import annotations

import inspect
import mmap
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qnext import ops
from qnext.ops import backends, cpu, reference, triton
from qnext.ops import torch as pytorch
from qnext.ops.cpu.kernels import kernels, take, widened


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


WITHOUT_MODULE = """
import sys
sys.modules["qnext.ops.cpu._native"] = None  # importing it fails, as where nothing was compiled
import torch
from qnext import ops
with torch.inference_mode():
    weight = ops.empty_quantized((32, 64), bits=4, group_size=32, scale_dtype=torch.float32)
    weight.codes.fill_(0x99)
    weight.scales.fill_(0.5)
    for _ in range(2):
        print(ops.linear(torch.ones(1, 64), weight)[0, 0].item())
"""


def test_without_the_module_the_reference_serves_and_says_so_once() -> None:
    result = run(WITHOUT_MODULE, QNEXT_BACKEND="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["32.0", "32.0"]
    assert result.stderr.count("native CPU kernels are not available") == 1


def chosen_anew(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType | None:
    """What a process that starts with this QNEXT_BACKEND would compute with."""
    monkeypatch.setenv("QNEXT_BACKEND", name)
    return backends.cpu_kernels.__wrapped__()


def test_kernels_that_are_demanded_and_missing_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qnext.ops.cpu._native", None)  # importing it fails
    with pytest.raises(ImportError, match=re.escape("import of qnext.ops.cpu._native halted")):
        chosen_anew(monkeypatch, "cpu")


def test_a_backend_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "QNEXT_BACKEND must be 'cpu', 'torch' (also 'reference') or 'triton', not 'cuda'"
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen_anew(monkeypatch, "cuda")


def test_a_package_that_is_unknown_is_refused_and_others_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"": list(backends.PACKAGES), "none": [], "flashinfer, flash-qla": ["flash-qla", "flashinfer"]}
    for value, wanted in named.items():
        monkeypatch.setenv("QNEXT_PACKAGES", value)
        assert [name for name in backends.PACKAGES if backends.package_may_serve(name)] == wanted
    monkeypatch.setenv("QNEXT_PACKAGES", "flashinfer,vllm")
    message = "QNEXT_PACKAGES must be 'none' or names among flash-qla, flash-linear-attention, flashinfer, not 'vllm'"
    with pytest.raises(ValueError, match=re.escape(message)):
        chosen_anew(monkeypatch, "torch")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_torch_can_be_forced_by_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_anew(monkeypatch, name) is None


def test_gradients_and_other_dtypes_are_torchs_work() -> None:
    x, weight = torch.ones(1, 4), torch.ones(1, 4, requires_grad=True)
    assert not take(x, weight)
    assert not take(x.double())
    assert not take(x.bfloat16())
    assert take(x) == (backends.cpu_kernels() is not None)
    with torch.no_grad():
        assert take(x, weight) == (backends.cpu_kernels() is not None)


def test_a_small_parameter_is_widened_once_and_again_when_it_changes() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    first = widened(parameter)
    assert widened(parameter) is first and first.dtype == torch.float32
    with torch.no_grad():
        parameter.fill_(2.0)
    assert widened(parameter).tolist() == [2.0] * 3


def test_facts_of_the_backend_that_serves() -> None:
    device = torch.device("cpu")
    has_kernels = backends.cpu_kernels() is not None
    backend = ops.backend_of(device)
    assert backend is (backends.CPU if has_kernels else backends.TORCH)
    assert (ops.instruction_set() is not None) == has_kernels
    assert ops.arithmetic_of(device).startswith("native " if has_kernels else "torch ")
    assert ops.backend_of(torch.device("meta")) is backends.TORCH


def test_activations_have_the_width_of_the_backend_unless_gradients_are_wanted() -> None:
    table = torch.ones(3, 32, dtype=torch.bfloat16)
    narrow = torch.float32 if backends.cpu_kernels() is not None else torch.bfloat16
    assert ops.activation_dtype(table) == narrow
    assert ops.activation_dtype(table.double()) == torch.float64
    wanting = table.clone().requires_grad_()
    assert ops.activation_dtype(wanting) == torch.bfloat16
    with torch.no_grad():
        assert ops.activation_dtype(wanting) == narrow


@pytest.mark.parametrize("size", [32, 33])
def test_rows_are_looked_up_in_the_width_that_is_asked_for(size: int) -> None:
    table = torch.randn(5, size).bfloat16()
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(ops.embedding(ids, table), table[ids])
    assert torch.equal(ops.embedding(ids, table, dtype=torch.float32), table[ids].float())


OPS = [name for name in pytorch.__all__ if not name.startswith("_")]
WITHOUT_NATIVE_KERNEL = {"lora_experts_swiglu", "gated_delta_rule"}


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_one_signature(name: str) -> None:
    """In every backend, in the predicates that choose, and in public: whoever serves can be swapped."""
    public = inspect.signature(getattr(ops, name))
    assert hasattr(cpu, name) != (name in WITHOUT_NATIVE_KERNEL)
    with_kernels = [backend for backend in (cpu, triton) if hasattr(backend, name)]
    for backend in (reference, pytorch, *with_kernels):
        assert inspect.signature(getattr(backend, name)) == public, backend.__name__
    for backend in with_kernels:
        predicate = inspect.signature(getattr(backend, f"serves_{name}"))
        assert predicate.parameters == public.parameters and predicate.return_annotation == "bool"


@pytest.mark.parametrize("name", ["add_linear", "normed_linears", "normed_route", "add_experts"])
def test_so_has_one_that_is_several_where_no_kernel_serves(name: str) -> None:
    public = inspect.signature(getattr(ops, name))
    for backend in (reference, triton):
        assert inspect.signature(getattr(backend, name)) == public, backend.__name__
    assert inspect.signature(getattr(triton, f"serves_{name}")).parameters == public.parameters


@pytest.mark.skipif(backends.cpu_kernels() is None, reason="native kernels are not here")
def test_threads_are_set_for_torch_and_for_the_kernels() -> None:
    before = torch.get_num_threads()
    try:
        ops.set_num_threads(3)
        assert torch.get_num_threads() == 3 == kernels().num_threads()
    finally:
        ops.set_num_threads(before)


def test_huge_memory_is_memory() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = [ops.empty_huge((1000, 333), dtype=torch.bfloat16).fill_(i) for i in range(5)]
    assert all((tensor == i).all() and tensor.shape == (1000, 333) for i, tensor in enumerate(tensors))
    assert len({tensor.data_ptr() for tensor in tensors}) == 5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_touched_memory_is_there_and_keeps_what_it_held() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    written = ops.empty_huge((300_000,), dtype=torch.int64).copy_(torch.arange(300_000))
    tensors = [ops.empty_huge((7 << 20,), dtype=torch.uint8) for _ in range(5)]
    small = torch.ones(3)
    before = resident()
    ops.touch([*tensors, small, written, torch.empty(9, device="meta")])
    # the pages that they share with `written` were there before
    assert resident() - before > 30 << 20
    assert torch.equal(written, torch.arange(300_000)) and torch.equal(small, torch.ones(3))
    ops.touch([])


@pytest.mark.skipif(os.environ.get("QNEXT_BACKEND") in ("torch", "reference"), reason="torch is wanted")
@pytest.mark.skipif(shutil.which("c++") is None, reason="nothing to compile with")
def test_where_there_is_a_compiler_the_kernels_are_built() -> None:
    """A build that failed would let every native test be skipped and nobody know."""
    assert backends.cpu_kernels() is not None
