"""GPU kernels where there is no GPU: interpreted against the reference, and compiled for one that is not here.

Triton decides when it is imported whether it interprets, so both have processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
MOST_SHARED = 227 * 1024  # bytes that a block of an H200 may have
# Bytes of a thread's registers that may lie in memory. Rows in fp32 take three products for one. They are rare on a
# GPU.
MOST_STACK, MOST_STACK_OF_FP32 = 64, 320


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    free = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_", "QNEXT_"))}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=free | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("forms", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_are_the_reference_under_the_interpreter(forms: str) -> None:
    tests = ("pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", forms, "tests/ops/triton")
    result = run(*tests, TRITON_INTERPRET="1", QNEXT_BACKEND="triton")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    last = result.stdout.splitlines()[-1]
    assert " passed" in last and ("skipped" not in last or forms == "slow")  # some of these need a GPU's packages


@pytest.mark.slow
def test_kernels_compile_for_an_h200_at_the_released_sizes(tmp_path: Path) -> None:
    """They fit into its registers and its shared memory."""
    result = run("tests.ops.triton.compiled", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    made = [json.loads(line) for line in result.stdout.splitlines()]
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "qnext/ops/triton/kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {each["kernel"] for each in made} == written
    for each in made:
        most = MOST_STACK_OF_FP32 if each["types"][0] == "*fp32" else MOST_STACK
        assert each["stack"] <= most and each["shared"] <= MOST_SHARED, each


def test_the_backend_is_refused_where_nothing_can_run_it() -> None:
    program = "import torch\nfrom qnext import ops\nops.backend_of(torch.device('cpu'))"
    environment = {**os.environ, "QNEXT_BACKEND": "triton", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    result = forked.run(["-c", program], env=environment)
    assert result.returncode == 1
    assert "QNEXT_BACKEND=triton needs a CUDA device, or Triton's interpreter" in result.stderr


def test_the_report_of_a_machine_without_a_gpu_is_one_line() -> None:
    free = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "QNEXT_"))}
    hidden = forked.run([ROOT / "benchmarks/check_gpu.py"], env=free | {"CUDA_VISIBLE_DEVICES": ""})
    assert (hidden.returncode, hidden.stdout, hidden.stderr.count("\n")) == (2, "", 1), hidden.stderr
    assert "they need a CUDA device and Triton" in hidden.stderr
