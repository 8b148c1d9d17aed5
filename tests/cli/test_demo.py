"""How `qnext demo` ends: the model's page, and the terminal as one of its clients."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from qnext.cli.demo import talk_with
from qnext.cli.terminal import chat_loop
from qnext.recipes import RECIPES, demo
from qnext.recipes.recipe import prepare
from qnext.server.run import port_or_any
from qnext.session.sampling import resolve_sampling
from qnext.session.served import name_of
from tests.cli.test_train import tiny_recipe


class Display:
    """Keeps what the demo notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_the_page_is_open_while_the_terminal_talks(
    plain_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display()
    pages: list[str] = []
    converse = chat_loop.converse

    def look_and_converse(talk: object) -> None:
        found = re.search(r"http\S+", display.lines[-1])
        assert found is not None
        pages.append(httpx2.get(found[0]).text)
        assert httpx2.get(f"{found[0]}live/model").json()["has_chat"] is False
        converse(talk)  # type: ignore[arg-type]

    monkeypatch.setattr(chat_loop, "converse", look_and_converse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main(\n"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    talk_with(plain_folder, display, 0, 0)  # type: ignore[arg-type]
    assert "<title>" in pages[0] and "answers no questions" in " ".join(display.lines)
    assert capsys.readouterr().out.strip(), "the model went on"


def test_a_port_that_is_taken_gives_way() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port_or_any(port) == 0
    assert port_or_any(port) == port


def test_the_folder_recommends_its_sampling_and_says_what_it_is(tmp_path: Path) -> None:
    recipe = demo(seconds=1.0, seed=0)
    run = prepare(replace(tiny_recipe(), name="demo", sampling=recipe.sampling, about=recipe.about), tmp_path / "run")
    folder = run.save()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is True and generation["eos_token_id"] == run.trainer.model.config.eos_token_id
    params = resolve_sampling(folder, {"max_tokens": 8})
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0.6, 0.9, 1.1)
    assert resolve_sampling(folder, {"temperature": 0.0}).temperature == 0.0
    assert name_of(str(folder)) == "demo"
    card = (folder / "README.md").read_text()
    assert "code completion model" in card and "answers no questions" in card and "thirty functions" in card


def test_every_recipe_of_code_is_sampled_and_says_what_it_is() -> None:
    recipes = [demo(seconds=1.0, seed=0), *(RECIPES[name]() for name in ("small-code", "micro-code"))]
    for recipe in recipes:
        assert recipe.sampling["temperature"] > 0 and "no questions" in recipe.about


def test_a_recipe_without_sampling_leaves_none(tmp_path: Path) -> None:
    run = prepare(tiny_recipe(), tmp_path / "run")
    folder = run.save()
    assert set(json.loads((folder / "generation_config.json").read_text())) == {"eos_token_id", "pad_token_id"}
    assert name_of(str(folder)) == "tiny"
