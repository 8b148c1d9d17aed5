"""Everyone can use it: axe finds nothing, a phone has room."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.acts import ask
from tests.server.page.conftest import OpenPage
from tests.server.page.mock import Script

axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
SOURCE = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]},
    "resultTypes": ["violations"],
}


def violations(page: Page) -> list[str]:
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(SOURCE)
    found = page.evaluate("(rules) => axe.run(document, rules)", RULES)
    assert found["passes"], "axe looked at nothing"
    return [f"{v['id']}: {node['html'][:160]}" for v in found["violations"] for node in v["nodes"]]


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_axe_finds_nothing(open_page: OpenPage, script: Script, theme: str, size: str) -> None:
    page = open_page(size=size, theme=theme, bypass_csp=True)
    ask(page, "show")
    page.click(".thoughts summary")
    ask(page, "tool")
    if size == "phone":
        assert not violations(page)
        page.click("#tab-live")
    page.locator("#layer-table summary").click()
    expect(page.locator("#layer-table tbody tr")).to_have_count(8)
    assert not violations(page)
    if size == "phone":
        page.click("#tab-chat")
        page.click("#sidebar-open")
        expect(page.locator("#new-chat")).to_be_visible()
        assert not violations(page)
        page.click("#sidebar-close")
    page.click("#settings")
    assert not violations(page)
    page.get_by_label("Close settings").click()


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_axe_finds_nothing_before_the_first_message(open_page: OpenPage, script: Script, theme: str) -> None:
    script.key = "secret"
    page = open_page(theme=theme, bypass_csp=True, wait=False, expected=("401",))
    expect(page.locator("#key-box")).to_be_visible()
    assert not violations(page)
    page.get_by_role("button", name="Cancel").click()
    assert not violations(page)


def test_axe_would_find_something(open_page: OpenPage) -> None:
    page = open_page(bypass_csp=True)
    page.evaluate("document.getElementById('send').removeAttribute('aria-label')")
    page.evaluate("document.getElementById('send').removeAttribute('title')")
    assert any(found.startswith("button-name") for found in violations(page))


@pytest.mark.parametrize("width", [320, 390, 768, 1024])
def test_nothing_is_wider_than_the_screen(open_page: OpenPage, script: Script, width: int) -> None:
    script.num_layers, script.num_experts = 48, 512
    page = open_page(size="phone")
    page.set_viewport_size({"width": width, "height": 780})
    ask(page, "markdown")
    fits = "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    if width < 760:
        page.tap("#tab-live")
        expect(page.locator("#grid")).to_be_visible()
        expect(page.locator("#prompt")).to_be_hidden()
        assert page.evaluate(fits)
        boxes = page.locator("#live *:visible").all()
        assert all((box.bounding_box() or {"x": 0, "width": 0})["x"] >= 0 for box in boxes[:60])


def test_the_list_of_conversations_is_a_drawer_on_a_phone(open_page: OpenPage) -> None:
    page = open_page(size="phone")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#sidebar-open")
    expect(page.locator("#new-chat")).to_be_visible()
    page.tap("#sidebar-close")
    expect(page.locator("#sidebar")).to_be_hidden()


def test_the_theme_follows_the_system_until_one_is_chosen(open_page: OpenPage) -> None:
    page = open_page(theme="light")
    root = page.locator("html")
    expect(root).to_have_attribute("data-theme", "light")
    page.emulate_media(color_scheme="dark")
    expect(root).to_have_attribute("data-theme", "dark")
    page.click("#theme")
    expect(root).to_have_attribute("data-theme", "light")
    page.reload()
    expect(root).to_have_attribute("data-theme", "light")
