"""What a reader does on the page."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect


def ask(page: Page, text: str, *, wait: bool = True) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    if wait:
        wait_for_end(page)


def wait_for_end(page: Page) -> None:
    expect(page.locator("#send")).to_have_attribute("data-kind", "send")
    expect(page.locator(".message.running")).to_have_count(0)


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant")


def last_answer(page: Page) -> Locator:
    return answers(page).last.locator(".body > .markdown")


def reload(page: Page) -> None:
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
