"""The page on `qnext serve` itself: a conversation, a completion, the experts of a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.server.page.acts import answers, ask
from tests.server.page.conftest import OpenPage
from tests.server.page.test_live_view import brightness, wait_until
from tests.server.serving import running_server
from tests.text_folders import save_plain


@pytest.fixture(params=["chat", "plain"])
def address(request: pytest.FixtureRequest, chat_model: Path, tmp_path: Path) -> Iterator[str]:
    folder = chat_model if request.param == "chat" else save_plain(tmp_path / "plain")
    with running_server(folder, engine_options={"max_model_len": 160}) as running:
        yield f"{running.url}/"


def test_an_answer_and_the_experts_that_wrote_it(open_page: OpenPage, address: str) -> None:
    page = open_page()
    before = brightness(page, 0, 0)
    ask(page, "Say something.")
    expect(answers(page)).to_have_count(1)
    footer = answers(page).locator("footer")
    expect(footer).to_contain_text("tokens/s")
    # A random model spreads its tokens: the first expert of the first layer is among those that had some.
    wait_until(page, lambda: brightness(page, 0, 0) != before)
