"""These tests run in a process of their own, which tests/test_other_device.py starts. Elsewhere none is collected."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

VARIABLE = "TESTS_ON_OTHER_DEVICE"

if VARIABLE not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.other_device.device import OtherDevice

    @pytest.fixture
    def other() -> Iterator[OtherDevice]:
        """The device, for one test."""
        with OtherDevice() as opened:
            yield opened
