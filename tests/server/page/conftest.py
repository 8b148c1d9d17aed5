"""One browser for all tests of the page, a new context for each, and a server that speaks by script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.page.mock import Script, serve

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 60_000  # of whatever waits for the page: a busy machine is slow, and no fault of it
SIZES = {"wide": (1440, 900), "phone": (390, 844)}


# For this folder, not for the session: while it is open, an event loop runs in the thread of the tests, and others of
# the server start their own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def served() -> Iterator[tuple[Script, str]]:
    script = Script()
    with serve(script) as address:
        yield script, address


def renewed(script: Script) -> Script:
    """The same object as at first, but for what still goes on."""
    vars(script).update(vars(Script(num_viewers=script.num_viewers, num_running=script.num_running)))
    return script


@pytest.fixture
def script(served: tuple[Script, str]) -> Script:
    """What the server says, as new."""
    return renewed(served[0])


@pytest.fixture
def address(served: tuple[Script, str], script: Script) -> str:
    """Where the page is."""
    return served[1]


class Opened:
    """A page, and everything that it did which it should not do."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.faults: list[str] = []
        self.expected: tuple[str, ...] = ()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)
        page.on("popup", lambda popup: self.faults.append(f"popup: {popup.url}"))

    def _console(self, message: Any) -> None:
        # Tests read pixels back, which the page never does; the browser would rather be told.
        expected = (*self.expected, "willReadFrequently")
        if message.type in ("error", "warning") and not any(part in message.text for part in expected):
            self.faults.append(f"console: {message.text}")

    def _dialog(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.faults.append(f"request: {request.url}")
        if "secret" in request.url:
            self.faults.append(f"a key in an address: {request.url}")


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[OpenPage]:
    """Open the page: `open_page(size="phone", theme="light", expected=("503",))`. Afterwards no page may have had an
    error, a CSP violation, a dialog or a request to elsewhere, save console messages that hold one of `expected`."""
    opened: list[Opened] = []
    contexts = []

    def open_one(
        *, size: str = "wide", theme: str = "dark", expected: tuple[str, ...] = (), wait: bool = True, **options: Any
    ) -> Page:
        width, height = SIZES[size]
        # Without animations, unless a test is about them: drawing without a GPU takes the time of others.
        options = {"reduced_motion": "reduce", **options}
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, has_touch=size == "phone", **options
        )
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        one = Opened(context.new_page(), address)
        one.expected = expected
        opened.append(one)
        one.page.goto(address)
        if wait:
            one.page.wait_for_selector("html[data-ready]", state="attached")
        return one.page

    yield open_one
    for context in contexts:
        context.close()
    faults = [fault for one in opened for fault in one.faults]
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="package")
def one_page(browser: Browser, served: tuple[Script, str]) -> Iterator[Opened]:
    """A page that many tests share: loading one takes most of a test's time."""
    context = browser.new_context(
        viewport={"width": SIZES["wide"][0], "height": SIZES["wide"][1]},
        color_scheme="dark",
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(PATIENCE_MS)
    renewed(served[0])
    one = Opened(context.new_page(), served[1])
    one.page.goto(served[1])
    one.page.wait_for_selector("html[data-ready]", state="attached")
    yield one
    context.close()


@pytest.fixture
def chat(one_page: Opened, script: Script) -> Iterator[Page]:
    """The shared page with a new conversation. The test may not have done what `open_page` forbids."""
    one_page.page.keyboard.press("Control+k")
    one_page.faults.clear()
    yield one_page.page
    assert not one_page.faults, "\n".join(one_page.faults)
