"""Whatever a model writes is text."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.acts import ask, last_answer
from tests.server.page.answers import HOSTILE
from tests.server.page.mock import Script

FORBIDDEN = "img, script, style, iframe, object, embed, form, math, base, link, meta, video, audio, svg circle"


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_output_is_inert(chat: Page, script: Script, name: str) -> None:
    ask(chat, f"hostile {name}")
    answer = last_answer(chat)
    assert answer.locator(FORBIDDEN).count() == 0
    names = "[...document.querySelectorAll('.markdown *')].flatMap((e) => e.getAttributeNames())"
    assert not [found for found in chat.evaluate(names) if found.startswith("on") or found == "style"]
    for link in answer.locator("a").all():
        assert (link.get_attribute("href") or "").startswith(("http://", "https://"))
    assert chat.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The page lives on.
    ask(chat, "hello")
    expect(last_answer(chat)).to_have_text("You said: hello")


def test_text_is_shown_as_it_is(chat: Page) -> None:
    ask(chat, "hostile html")
    expect(last_answer(chat)).to_contain_text("<img src=x onerror=alert(1)> <script>alert(2)</script>")


def test_only_addresses_of_the_web_become_links(chat: Page) -> None:
    ask(chat, "hostile links")
    links = [link.get_attribute("href") for link in last_answer(chat).locator("a").all()]
    assert links == ["https://evil.example/?q=1", "https://evil.example/pixel.png", "https://user:pw@evil.example/"]
    expect(last_answer(chat).locator(".host").last).to_have_text("(evil.example)")


def test_characters_that_turn_text_around_are_named(chat: Page) -> None:
    ask(chat, "hostile direction")
    text = last_answer(chat).inner_text()
    assert "[U+202E]gnp.exe" in text
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def test_hostile_arguments_and_names_are_text(chat: Page, script: Script) -> None:
    ask(chat, "tool")
    expect(chat.locator(".call code")).to_contain_text("<img src=x onerror=alert(1)>")
    assert chat.locator(".call").locator(FORBIDDEN).count() == 0


def test_a_message_of_the_reader_is_text(chat: Page) -> None:
    ask(chat, "<img src=x onerror=alert(1)> **not bold**")
    expect(chat.locator(".bubble")).to_have_text("<img src=x onerror=alert(1)> **not bold**")
    expect(chat.locator("#title")).to_contain_text("<img src=x")
