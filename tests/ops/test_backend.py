"""Who runs: native kernels, or the reference where they are missing, forbidden or not fit."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from qnext import ops
from qnext.ops import backend


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


def test_kernels_that_are_demanded_and_missing_are_an_error() -> None:
    result = run(WITHOUT_MODULE, QNEXT_BACKEND="cpu")
    assert result.returncode != 0 and "import of qnext.ops.cpu._native halted" in result.stderr


def test_a_backend_that_is_none_is_refused() -> None:
    result = run("from qnext.ops.backend import native_module; native_module()", QNEXT_BACKEND="cuda")
    assert "QNEXT_BACKEND must be 'cpu' or 'reference', not 'cuda'" in result.stderr


def test_the_reference_can_be_forced() -> None:
    code = "from qnext.ops.backend import native_module; print(native_module())"
    result = run(code, QNEXT_BACKEND="reference")
    assert result.stdout.strip() == "None" and not result.stderr


def test_gradients_and_other_dtypes_are_the_references_work() -> None:
    x, weight = torch.ones(1, 4), torch.ones(1, 4, requires_grad=True)
    assert not backend.runs_native(x, weight)
    assert not backend.runs_native(x.double())
    assert not backend.runs_native(x.bfloat16())
    assert backend.runs_native(x) == (backend.native_module() is not None)
    with torch.no_grad():
        assert backend.runs_native(x, weight) == (backend.native_module() is not None)


def test_a_small_parameter_is_widened_once_and_again_when_it_changes() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    first = backend.wide(parameter)
    assert backend.wide(parameter) is first and first.dtype == torch.float32
    with torch.no_grad():
        parameter.fill_(2.0)
    assert backend.wide(parameter).tolist() == [2.0] * 3


@pytest.mark.skipif(backend.native_module() is None, reason="native kernels are not here")
def test_threads_are_set_for_torch_and_for_the_kernels() -> None:
    before = torch.get_num_threads()
    try:
        ops.set_num_threads(3)
        assert torch.get_num_threads() == 3 == backend.native().num_threads()
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


@pytest.mark.skipif(os.environ.get("QNEXT_BACKEND") == "reference", reason="the reference is wanted")
@pytest.mark.skipif(shutil.which("c++") is None, reason="nothing to compile with")
def test_where_there_is_a_compiler_the_kernels_are_built() -> None:
    """A build that failed would let every native test be skipped and nobody know."""
    assert backend.native_module() is not None
