"""Options of the whole test suite."""

from __future__ import annotations

import pytest

import qnext  # noqa: F401 - before any test loads torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--llama-cpp-source",
        default=None,
        metavar="FOLDER",
        help="llama.cpp source tree; enables the checks against its vocabulary files",
    )
