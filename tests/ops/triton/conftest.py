"""The tests of GPU kernels run on a CUDA device, or under Triton's interpreter in a process of their own.

Triton decides when it is imported whether it interprets, so tests/ops/test_triton.py starts the process. Elsewhere
nothing here is collected.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if IS_INTERPRETED:
    from .interpreter import look_for_overflows, repeat_less

    repeat_less()

if not IS_INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not IS_INTERPRETED and _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def slow_tests_look_for_overflows(request: pytest.FixtureRequest) -> None:
    if IS_INTERPRETED:
        look_for_overflows(are_sought=request.node.get_closest_marker("slow") is not None)
