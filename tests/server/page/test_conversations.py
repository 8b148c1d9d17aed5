"""Conversations that are kept, found, renamed, deleted, exported and imported; settings."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.server.page.acts import answers, ask, last_answer, reload, wait_for_end
from tests.server.page.conftest import OpenPage
from tests.server.page.mock import Script

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def titles(page: Page) -> list[str]:
    return page.locator("button.conversation").all_inner_texts()


def test_a_reload_keeps_conversations_and_versions(open_page: OpenPage) -> None:
    chat = open_page()
    ask(chat, "first thing")
    answers(chat).get_by_label("Regenerate").click()
    wait_for_end(chat)
    chat.click("#new-chat")
    ask(chat, "second thing")
    reload(chat)
    assert titles(chat) == ["second thing", "first thing"]
    expect(last_answer(chat)).to_have_text("You said: second thing")
    chat.get_by_role("button", name="first thing").click()
    expect(last_answer(chat)).to_have_text("You said: first thing")
    expect(answers(chat).locator(".versions")).to_have_text("2/2")
    expect(answers(chat).locator(".figures")).to_contain_text("31.5 tokens/s")


def test_search_rename_and_delete(open_page: OpenPage) -> None:
    chat = open_page()
    for text in ("about apples", "about pears"):
        chat.keyboard.press("Control+k")
        ask(chat, text)
    chat.fill("#search", "said: about app")
    assert titles(chat) == ["about apples"]
    chat.fill("#search", "")
    row = chat.locator("#conversations li", has_text="about apples")
    row.hover()
    row.get_by_label("Rename").click()
    chat.get_by_label("Name of the conversation").fill("Fruit")
    chat.keyboard.press("Enter")
    assert sorted(titles(chat)) == ["Fruit", "about pears"]
    row = chat.locator("#conversations li", has_text="about pears")
    row.hover()
    row.get_by_label("Delete").click()
    expect(chat.locator(".question")).to_contain_text("Delete “about pears”?")
    chat.locator(".question").get_by_role("button", name="Delete").click()
    expect(chat.locator(".message")).to_have_count(0)
    reload(chat)
    assert titles(chat) == ["Fruit"]


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(open_page: OpenPage, script: Script) -> None:
    chat = open_page()
    ask(chat, "slow one", wait=False)
    expect(last_answer(chat)).to_contain_text("Slowly on")
    chat.locator("#conversations").get_by_label("Delete").click()
    chat.locator(".question").get_by_role("button", name="Delete").click()
    wait_for_end(chat)
    expect(chat.locator(".message")).to_have_count(0)
    reload(chat)
    assert titles(chat) == []


def test_export_and_import_bring_everything_back(open_page: OpenPage, tmp_path: Path) -> None:
    chat = open_page()
    ask(chat, "think of a tree")
    answers(chat).get_by_label("Regenerate").click()
    wait_for_end(chat)
    ask(chat, "tool call")
    with chat.expect_download() as download:
        chat.click("#export")
    path = tmp_path / "all.json"
    download.value.save_as(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["format"] == "qnext-conversations" and len(saved["conversations"]) == 1
    before = chat.locator("#messages").inner_text()

    other = open_page()
    other.set_input_files("#import-file", path)
    expect(other.locator(".message")).to_have_count(4)
    assert other.locator("#messages").inner_text() == before
    expect(answers(other).first.locator(".versions")).to_have_text("2/2")
    reload(other)
    assert titles(other) == ["think of a tree"]


def test_a_wrong_file_is_refused(chat: Page, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    chat.set_input_files("#import-file", path)
    expect(chat.locator("#notice")).to_have_text("Not imported. The file holds no conversations of this page.")


def test_settings_show_the_defaults_and_send_what_they_show(open_page: OpenPage, script: Script) -> None:
    chat = open_page()
    chat.click("#settings")
    expect(chat.get_by_label("Temperature")).to_have_value("0.7")
    expect(chat.get_by_label("Top k")).to_have_value("20")
    expect(chat.get_by_label("Seed")).to_have_value("")
    chat.get_by_label("System prompt of this conversation").fill("Be brief.")
    values = {"Temperature": "0.25", "Max tokens": "99", "Seed": "7", "Repetition penalty": "1.1"}
    for label, value in values.items():
        chat.get_by_label(label).fill(value)
    chat.get_by_label("Presence penalty").fill("-0.5")
    chat.get_by_label("Frequency penalty").fill("0.5")
    chat.get_by_label("Stop texts").fill("END\n###")
    chat.get_by_label("JSON schema of the answer").fill(json.dumps(SCHEMA))
    chat.get_by_label("Tools", exact=True).fill(json.dumps(TOOLS))
    chat.get_by_label("Close settings").click()
    ask(chat, "hello")
    body = script.requests[-1]
    expected = {
        "temperature": 0.25,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0,
        "max_tokens": 99,
        "seed": 7,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "stop": ["END", "###"],
        "tools": TOOLS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
    }
    assert {name: body.get(name) for name in expected} == expected
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    reload(chat)
    chat.click("#settings")
    expect(chat.get_by_label("Temperature")).to_have_value("0.25")
    expect(chat.get_by_label("System prompt of this conversation")).to_have_value("Be brief.")
    chat.get_by_role("button", name="Back to the server's defaults").click()
    expect(chat.get_by_label("Temperature")).to_have_value("0.7")
    chat.keyboard.press("Escape")
    ask(chat, "hello")
    assert script.requests[-1]["temperature"] == 0.7 and "seed" not in script.requests[-1]


def test_a_wrong_setting_is_told_and_not_sent(open_page: OpenPage, script: Script) -> None:
    chat = open_page()
    chat.click("#settings")
    chat.get_by_label("Top p").fill("1.5")
    expect(chat.get_by_label("Top p")).to_have_attribute("aria-invalid", "true")
    chat.get_by_label("Tools", exact=True).fill("{")
    expect(chat.locator("#help-tools")).to_have_text("not JSON")
    chat.get_by_label("Close settings").click()
    ask(chat, "hello")
    expect(chat.locator("#notice")).to_have_text("Settings, Top p: must be 0 to 1.")
    assert not script.requests
    expect(chat.locator("#prompt")).to_have_value("hello")


def test_an_answer_that_was_cut_off_by_a_reload_is_kept(open_page: OpenPage, script: Script) -> None:
    chat = open_page()
    ask(chat, "slow one", wait=False)
    expect(last_answer(chat)).to_contain_text("Slowly on on")
    chat.wait_for_timeout(1100)
    reload(chat)
    expect(last_answer(chat)).to_contain_text("Slowly on on")
    assert script.num_running <= 1
