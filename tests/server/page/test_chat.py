"""Asking and answers."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.acts import answers, ask, last_answer, wait_for_end
from tests.server.page.conftest import OpenPage
from tests.server.page.mock import MAX_MODEL_LEN, Script


def test_an_answer_comes_piece_by_piece(chat: Page, script: Script) -> None:
    script.pause = 0.05
    ask(chat, "say Grüße, 世界 🦉 to all of them", wait=False)
    expect(chat.locator(".message.running .markdown")).to_contain_text("You said:")
    assert len(last_answer(chat).inner_text()) < len("You said: say Grüße, 世界 🦉 to all of them")
    wait_for_end(chat)
    expect(last_answer(chat)).to_have_text("You said: say Grüße, 世界 🦉 to all of them")
    assert script.requests[-1]["messages"] == [{"role": "user", "content": "say Grüße, 世界 🦉 to all of them"}]
    assert script.requests[-1]["stream"] is True and script.requests[-1]["timings"] is True
    assert script.requests[-1]["model"] == script.name


def test_figures_stand_under_an_answer(chat: Page) -> None:
    ask(chat, "hello")
    figures = answers(chat).locator(".figures").inner_text()
    assert "31.5 tokens/s" in figures and "24 tokens" in figures and "128 cached" in figures and "75 %" in figures
    assert "first token" in figures


def test_the_gauge_shows_how_full_the_context_is(chat: Page) -> None:
    expect(chat.locator("#context")).to_be_hidden()
    ask(chat, "hello")
    expect(chat.locator("#context-text")).to_have_text("1,024 / 4,096")
    assert float(chat.get_attribute("#context", "aria-valuenow") or 0) == pytest.approx(1024 / MAX_MODEL_LEN, abs=1e-3)
    dashes = chat.evaluate("getComputedStyle(document.getElementById('context-arc')).strokeDasharray")
    assert dashes.startswith("25px")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_what_came(chat: Page, script: Script, way: str) -> None:
    ask(chat, "slow please", wait=False)
    expect(last_answer(chat)).to_contain_text("Slowly on on on")
    if way == "button":
        chat.click("#send")
    else:
        chat.keyboard.press("Escape")
    wait_for_end(chat)
    expect(last_answer(chat)).to_contain_text("Slowly on on")
    expect(answers(chat).locator(".figures")).to_contain_text("stopped")
    chat.wait_for_timeout(200)
    assert script.num_cancelled == 1 and script.num_running == 0


def test_a_conversation_goes_on(chat: Page, script: Script) -> None:
    ask(chat, "one")
    ask(chat, "two")
    assert [m["role"] for m in script.requests[-1]["messages"]] == ["user", "assistant", "user"]
    assert script.requests[-1]["messages"][1]["content"] == "You said: one"


def test_versions_of_a_message_are_branches(chat: Page, script: Script) -> None:
    ask(chat, "first")
    ask(chat, "second")
    chat.locator(".message.user").nth(0).get_by_label("Edit", exact=True).click()
    chat.fill("textarea.edit", "changed")
    chat.press("textarea.edit", "Enter")
    wait_for_end(chat)
    expect(chat.locator(".message")).to_have_count(2)
    expect(last_answer(chat)).to_have_text("You said: changed")
    assert [m["content"] for m in script.requests[-1]["messages"]] == ["changed"]
    expect(chat.locator(".message.user .versions")).to_have_text("2/2")
    chat.get_by_label("Previous version").click()
    expect(chat.locator(".message")).to_have_count(4)
    expect(last_answer(chat)).to_have_text("You said: second")
    expect(chat.get_by_label("Previous version")).to_be_disabled()
    chat.get_by_label("Next version").click()
    expect(last_answer(chat)).to_have_text("You said: changed")


def test_regenerate_makes_another_version(chat: Page, script: Script) -> None:
    ask(chat, "again")
    for expected in ("2/2", "3/3"):
        answers(chat).get_by_label("Regenerate").click()
        wait_for_end(chat)
        expect(answers(chat).locator(".versions")).to_have_text(expected)
    assert [len(r["messages"]) for r in script.requests] == [1, 1, 1]
    chat.get_by_label("Previous version").click()
    expect(answers(chat).locator(".versions")).to_have_text("2/3")


def test_an_edited_answer_is_a_version_without_a_request(chat: Page, script: Script) -> None:
    ask(chat, "hello")
    answers(chat).get_by_label("Edit", exact=True).click()
    chat.fill("textarea.edit", "My **own** words")
    chat.get_by_role("button", name="Save as a version").click()
    expect(last_answer(chat)).to_have_text("My own words")
    assert len(script.requests) == 1
    ask(chat, "next")
    assert script.requests[-1]["messages"][1]["content"] == "My **own** words"


def test_thoughts_are_open_while_they_come_and_folded_after(chat: Page, script: Script) -> None:
    script.pause = 0.06
    ask(chat, "think about it", wait=False)
    expect(chat.locator(".thoughts")).to_have_attribute("open", "")
    expect(chat.locator(".thoughts summary")).to_have_text("Thinking…")
    wait_for_end(chat)
    expect(chat.locator(".thoughts")).not_to_have_attribute("open", "")
    expect(chat.locator(".thoughts summary")).to_contain_text("Thought for")
    expect(last_answer(chat)).to_have_text("The answer is 42.")
    chat.click(".thoughts summary")
    expect(chat.locator(".thoughts .markdown")).to_have_text("First I look at the question. Then I answer it.")


def test_thoughts_do_not_go_back_to_the_model(chat: Page, script: Script) -> None:
    ask(chat, "think")
    ask(chat, "more")
    assert script.requests[-1]["messages"][1] == {"role": "assistant", "content": "The answer is 42."}


def test_a_tool_call_is_shown_and_its_result_sent(chat: Page, script: Script) -> None:
    ask(chat, "tool, the weather")
    call = chat.locator(".call")
    expect(call.locator("strong")).to_have_text("get_weather")
    assert '"city": "Oslo"' in call.locator("code").inner_text()
    chat.get_by_label("Result of get_weather").fill('{"degrees": 21}')
    chat.get_by_role("button", name="Send result").click()
    wait_for_end(chat)
    expect(last_answer(chat)).to_have_text('The tool said: {"degrees": 21}')
    _, asked, answered = script.requests[-1]["messages"]
    assert asked["tool_calls"][0]["function"]["name"] == "get_weather"
    assert answered == {"role": "tool", "tool_call_id": "call_1", "content": '{"degrees": 21}'}
    expect(chat.locator(".results")).to_have_count(0)


def test_a_busy_server_says_when_and_can_be_asked_again(open_page: OpenPage, script: Script) -> None:
    chat = open_page(expected=("503",))
    script.failures = 1
    ask(chat, "hello")
    expect(chat.locator(".problem")).to_contain_text("The queue is full. It asks to wait 7 seconds.")
    chat.get_by_role("button", name="Try again").click()
    wait_for_end(chat)
    expect(last_answer(chat)).to_have_text("You said: hello")
    expect(chat.locator(".versions")).to_have_count(0)


def test_a_limited_key_is_told_so(open_page: OpenPage) -> None:
    chat = open_page(expected=("429",))
    ask(chat, "limited")
    expect(chat.locator(".problem")).to_contain_text("Too many requests for this key")
    expect(chat.locator(".problem")).to_contain_text("12 seconds")


def test_an_error_in_the_middle_keeps_what_came(chat: Page) -> None:
    ask(chat, "break it")
    expect(last_answer(chat)).to_have_text("You said: brea")
    expect(chat.locator(".problem")).to_contain_text("The engine failed at this step.")


def test_a_stream_without_an_end_is_told(chat: Page) -> None:
    ask(chat, "cut it")
    expect(last_answer(chat)).to_have_text("You said: cut")
    expect(chat.locator(".problem")).to_contain_text("before the answer was complete")


def test_a_server_that_is_gone_is_told(open_page: OpenPage) -> None:
    chat = open_page(expected=("ERR_", "Failed to load"))
    chat.route("**/v1/**", lambda route: route.abort())
    ask(chat, "hello")
    expect(chat.locator(".problem")).to_contain_text("The server cannot be reached.")


def test_the_key_is_asked_for_and_never_in_an_address(open_page: OpenPage, script: Script) -> None:
    script.key = "secret-key"
    chat = open_page(expected=("401",), wait=False)
    expect(chat.locator("#key-box")).to_be_visible()
    chat.fill("#key-field", "secret-key")
    chat.get_by_role("button", name="Use key").click()
    expect(chat.locator("#model-name")).to_have_text(script.name)
    ask(chat, "hello")
    expect(last_answer(chat)).to_have_text("You said: hello")
    kept = "JSON.stringify([sessionStorage, localStorage, location.href])"
    assert "secret" not in chat.evaluate(kept)
    chat.click("#key")
    chat.check("#key-keep")
    chat.get_by_role("button", name="Use key").click()
    assert "secret-key" in chat.evaluate("JSON.stringify(sessionStorage)")
    assert "secret" not in chat.evaluate("JSON.stringify([localStorage, location.href])")
    chat.reload()
    expect(chat.locator("#model-name")).to_have_text(script.name)


def test_without_a_chat_format_text_goes_on(open_page: OpenPage, script: Script) -> None:
    script.has_chat = False
    chat = open_page()
    expect(chat.locator("#prompt")).to_have_attribute("placeholder", "Text that the model continues")
    expect(chat.locator("#welcome-kind")).to_have_text(re.compile("no chat format.*answers no questions"))
    expect(chat.locator("#welcome-kind")).to_be_visible()
    ask(chat, "Once upon a time")
    expect(answers(chat).last.locator(".continued")).to_have_text("and so it went on.")
    assert script.requests[-1]["path"] == "/v1/completions"
    assert script.requests[-1]["prompt"] == "Once upon a time"
    ask(chat, " The end")
    assert script.requests[-1]["prompt"] == "Once upon a time and so it went on. The end"


def test_markdown_becomes_elements(chat: Page) -> None:
    ask(chat, "markdown")
    answer = last_answer(chat)
    for selector, text in [
        ("h4", "Why hybrid models stay quick"),
        ("strong", "Gated DeltaNet"),
        ("em", "fixed"),
        ("p code", "all"),
        ("th.align-right", "memory per token"),
        ("ol > li:nth-child(3)", "their answers are added."),
        ("ol ul li", "and one that is shared,"),
        ("pre .code-keyword >> nth=0", "def"),
        ("pre .code-call >> nth=0", "route"),
        ("blockquote", "Only 3.7 % of the weights take part in a token."),
        (".host", "(papers.example.org)"),
    ]:
        expect(answer.locator(selector)).to_have_text(text)
    for link in answer.locator("a").all():
        assert link.get_attribute("rel") == "noopener noreferrer" and link.get_attribute("target") == "_blank"


def test_a_model_that_talks_is_not_said_to_be_mute(chat: Page) -> None:
    expect(chat.locator("#welcome-title")).to_contain_text("Ask")
    expect(chat.locator("#welcome-kind")).to_be_hidden()


def test_keys_of_the_keyboard(chat: Page, script: Script) -> None:
    chat.click("#title")
    chat.keyboard.press("/")
    expect(chat.locator("#prompt")).to_be_focused()
    chat.keyboard.type("a")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("b")
    assert not script.requests
    chat.keyboard.press("Enter")
    wait_for_end(chat)
    assert script.requests[-1]["messages"][0]["content"] == "a\nb"
    chat.keyboard.press("Control+k")
    expect(chat.locator(".message")).to_have_count(0)


def test_copy_takes_the_text_as_the_model_wrote_it(chat: Page) -> None:
    ask(chat, "**loud**")
    answers(chat).get_by_label("Copy", exact=True).click()
    expect(answers(chat).locator("footer button").first.locator("path")).to_have_attribute("d", re.compile("^M4 10"))
    assert chat.evaluate("navigator.clipboard.readText()") == "You said: **loud**"


def test_a_long_answer_does_not_freeze_the_page(chat: Page) -> None:
    """2,000 tokens as fast as they can come: no frame waits for a quarter of a second."""
    chat.evaluate(
        "() => { window.longest = 0; let last = performance.now(); const tick = () => { const now = performance.now(); "
        "window.longest = Math.max(window.longest, now - last); last = now; requestAnimationFrame(tick); }; tick(); }"
    )
    ask(chat, "long")
    assert len(last_answer(chat).inner_text()) > 10_000
    assert chat.evaluate("window.longest") < 250
