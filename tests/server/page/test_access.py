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
    """What axe says of the page as it is, in both themes."""
    if not page.evaluate("Boolean(window.axe)"):
        page.evaluate(SOURCE)
    found = []
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished.catch(() => null)))")
        result = page.evaluate("(rules) => axe.run(document, rules)", RULES)
        assert result["passes"], "axe looked at nothing"
        found += [f"{theme}, {v['id']}: {node['html'][:160]}" for v in result["violations"] for node in v["nodes"]]
    return found


def test_axe_finds_nothing_on_a_wide_screen(open_page: OpenPage) -> None:
    page = open_page(bypass_csp=True)
    ask(page, "show")
    page.click(".thoughts summary")
    ask(page, "tool")
    page.locator("#layer-table summary").click()
    expect(page.locator("#layer-table tbody tr")).to_have_count(8)
    assert not violations(page)
    page.click("#settings")
    assert not violations(page)


def test_axe_finds_nothing_on_a_phone(open_page: OpenPage) -> None:
    page = open_page(size="phone", bypass_csp=True)
    ask(page, "show")
    ask(page, "tool")
    assert not violations(page)
    page.click("#sidebar-open")
    expect(page.locator("#new-chat")).to_be_visible()
    assert not violations(page)
    page.click("#sidebar-close")
    page.click("#tab-live")
    page.locator("#layer-table summary").click()
    expect(page.locator("#layer-table tbody tr")).to_have_count(8)
    assert not violations(page)


def test_axe_finds_nothing_before_the_first_message(open_page: OpenPage, script: Script) -> None:
    script.key = "secret"
    page = open_page(bypass_csp=True, wait=False, expected=("401",))
    expect(page.locator("#key-box")).to_be_visible()
    assert not violations(page)
    page.get_by_role("button", name="Cancel").click()
    assert not violations(page)
    # It would find a control without a name.
    page.evaluate("for (const name of ['aria-label', 'title']) document.getElementById('send').removeAttribute(name)")
    assert any("button-name" in found for found in violations(page))


def test_nothing_is_wider_than_the_screen(open_page: OpenPage, script: Script) -> None:
    script.num_layers, script.num_experts = 48, 512
    page = open_page(size="phone")
    ask(page, "markdown")
    fits = "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    # An ancestor that hides what overflows would hide it from the reader as well.
    cut = """() => [...document.querySelectorAll("#chat, #chat *, #live, #live *")].filter((e) => {
      const { left, right, width } = e.getBoundingClientRect();
      return width && (left < -1 || right > innerWidth + 1) && !e.closest("pre, .table-scroll, .off-screen, .hint");
    }).map((e) => e.outerHTML.slice(0, 120))"""
    for width in (320, 390, 768, 1024, 1100):
        page.set_viewport_size({"width": width, "height": 780})
        assert page.evaluate(fits), width
        assert not page.evaluate(cut), width
        if width < 760:
            page.tap("#tab-live")
            expect(page.locator("#grid")).to_be_visible()
            expect(page.locator("#prompt")).to_be_hidden()
            assert page.evaluate(fits), width
            assert not page.evaluate(cut), width
            page.tap("#tab-chat")


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
