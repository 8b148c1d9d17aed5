"""The tests of tests/other_device, in a process of their own: PyTorch never forgets a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.other_device.conftest import VARIABLE


def test_a_model_elsewhere_computes_what_it_computes_here() -> None:
    free = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "QNEXT_"))}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/other_device")
    result = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env=free | {VARIABLE: "1", "QNEXT_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout.splitlines()[-1] and "skipped" not in result.stdout.splitlines()[-1]
