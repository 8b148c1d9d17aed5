"""Options of the whole test suite."""

from __future__ import annotations

import gc
import logging
import os
import signal
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import qnext  # noqa: F401 - before any test loads torch
from qnext.interrupts import ENDING_SIGNALS
from tests.longest import LONGEST

gc.disable()  # until all tests are collected: nothing of that is garbage, and looks at it take half of the time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--llama-cpp-source",
        default=None,
        metavar="FOLDER",
        help="llama.cpp source tree; enables the checks against its vocabulary files",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish() -> None:
    """Modules and tests stay: no collection need look at them again."""
    gc.enable()
    gc.freeze()


@pytest.fixture(autouse=True)
def logs_of_others_stay() -> Iterator[None]:
    """`serve` makes the process's log its own, on the standard error of one test."""
    loggers = [logging.getLogger(), logging.getLogger("uvicorn")]
    before = [(each, each.handlers[:], each.level) for each in loggers]
    yield
    for each, handlers, level in before:
        each.handlers[:] = handlers
        each.setLevel(level)


@pytest.fixture
def warned(recwarn: pytest.WarningsRecorder) -> Callable[[], list[str]]:
    """Tells the messages of all warnings so far.

    What other tests of this process have left may be collected meanwhile, and warns of itself: that is not among them.
    """
    return lambda: [str(item.message) for item in recwarn if not issubclass(item.category, ResourceWarning)]


@pytest.fixture(params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes on the CPU: the native kernels, and then PyTorch."""
    from qnext.ops import backends  # with torch

    if request.param == "torch":
        monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    elif backends.cpu_kernels() is None:
        pytest.skip("the native kernels are not built")
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_signal_is_ignored() -> None:
    """A shell has a job in the background ignore Ctrl-C, and with it the programs that tests start and interrupt."""
    for number in ENDING_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def no_certificates_of_the_machine() -> Iterator[None]:
    """Each HTTP client would read all of them, 25 ms, and nothing here asks another machine."""
    paths = ssl.get_default_verify_paths()
    of_machine = {paths.openssl_cafile, paths.openssl_capath, *find_bundle()}
    of_machine |= {os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")}
    load = ssl.SSLContext.load_verify_locations

    def load_others(self: ssl.SSLContext, cafile: Any = None, capath: Any = None, cadata: Any = None) -> None:
        if cadata is not None or not {cafile, capath} - {None} <= of_machine:
            load(self, cafile, capath, cadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl.SSLContext, "load_verify_locations", load_others)
        yield


def find_bundle() -> list[str]:
    """The certificates that some clients bring along."""
    try:
        import certifi
    except ImportError:
        return []
    return [certifi.where()]
