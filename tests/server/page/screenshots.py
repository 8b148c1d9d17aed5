"""Pictures of the page for the documentation: `python -m tests.server.page.screenshots [URL [QUESTION]]`.

Without an address they show the mock. Those of the documentation are of `qnext serve` on the model of `qnext demo`.

Each must stay below 250 KB.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server.page.acts import ask
from tests.server.page.conftest import ARGUMENTS, CHROMIUM
from tests.server.page.mock import Script, serve

FOLDER = Path(__file__).parents[3] / "docs" / "images"
MAX_BYTES = 250_000
SIZES = {"wide": (1280, 800), "phone": (390, 844)}
QUESTION = "show me why a hybrid model stays quick at long context"


@contextmanager
def opened(browser: Browser, address: str, size: str, theme: str) -> Iterator[Page]:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, has_touch=size == "phone"
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    context.close()


def save(page: Page, name: str) -> None:
    path = FOLDER / f"{name}.png"
    page.screenshot(path=path)
    size = path.stat().st_size
    print(f"{path}: {size // 1000} KB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} is larger than {MAX_BYTES} bytes")


def take_all(address: str, question: str = QUESTION) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        with opened(browser, address, "wide", "light") as page:
            ask(page, question)
            page.wait_for_timeout(2500)
            save(page, "page-chat")
        # At work: some tokens are there and more are coming.
        with opened(browser, address, "wide", "dark") as page:
            ask(page, question, wait=False)
            page.wait_for_timeout(1200)
            save(page, "page-live")
        with opened(browser, address, "phone", "dark") as page:
            ask(page, question, wait=False)
            page.tap("#tab-live")
            page.wait_for_timeout(1200)
            save(page, "page-phone")
        browser.close()


def main() -> None:
    if len(sys.argv) > 1:
        take_all(*sys.argv[1:3])
        return
    script = Script(num_layers=16, num_experts=64, top_k=4, name="qwen3-next-16x64", pause=0.008, always_busy=True)
    with serve(script) as address:
        take_all(address)


if __name__ == "__main__":
    main()
