"""`qnext eval tasks`: the same numbers in this process and over HTTP, words and token ids, and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Running, running_server, save_served

from .command import Capture, run


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "asked")


@pytest.fixture(scope="module")
def server(served_folder: Path) -> Iterator[Running]:
    with running_server(served_folder) as running:
        yield running


ASKED = ("--tasks", "needle,parity", "--lengths", "600", "--depths", 2, "--samples", 1, "--likelihood", "--json")


def without_times(text: str) -> Any:
    document = json.loads(text)
    for cell in document["cells"]:
        assert cell.pop("seconds") > 0
    return document["plan"], document["cells"], document["totals"]


@pytest.mark.parametrize("more", [(), ("--chat", "--answer-tokens", 20)], ids=["text", "chat"])
def test_a_server_and_a_folder_answer_alike(
    more: tuple[Any, ...], served_folder: Path, server: Running, capsys: Capture
) -> None:
    here = run(capsys, "eval", "tasks", served_folder, *ASKED, *more)
    there = run(capsys, "eval", "tasks", "--url", server.url, *ASKED, *more)
    assert here.code == there.code == 0, here.err + there.err
    assert without_times(here.out) == without_times(there.out)
    cells = json.loads(here.out)["cells"]
    assert [(cell["kind"], cell["depth"]) for cell in cells] == [("needle", 0.0), ("needle", 1.0), ("parity", None)]
    assert all(cell["ranked"] is not None and len(cell["examples"]) == 1 for cell in cells)


def test_a_table_and_a_picture(served_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    picture = tmp_path / "map.svg"
    asked = ("--tasks", "needle", "--lengths", "600", "--samples", 1, "--depths", 3)
    told = run(capsys, "eval-tasks", served_folder, *asked, "--picture", picture)
    assert told.code == 0 and told.out.startswith("needle   0.0% [0.0%, 56.1%] exact\n") and str(picture) in told.err
    assert picture.read_text().count("<rect") == 4


def test_token_ids_need_no_tokenizer(served_folder: Path, capsys: Capture) -> None:
    told = run(capsys, "eval", "tasks", served_folder, "--ids", "--tasks", "mqar,parity", "--lengths", "40", "--json")
    scores = json.loads(told.out)["scores"]
    assert [score["kind"] for score in scores] == ["mqar", "parity"] and scores[0]["num_problems"] == 10


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "qnext eval-tasks: give either MODEL or --url"),
        (["MODEL", "--tasks", "haystack"], "no task 'haystack'"),
        (["MODEL", "--lengths", "many"], "--lengths: 'many' is no whole number"),
        (["MODEL", "--lengths", "9k"], "a length of 9000 is beyond the model's 2048 tokens"),
        (["MODEL", "--ids", "--chat"], "--ids needs MODEL"),
        (["MODEL", "--picture", "a.gif"], "pictures are .png or .svg"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9: ConnectError"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, served_folder: Path, capsys: Capture) -> None:
    told = run(capsys, "eval", "tasks", *(served_folder if word == "MODEL" else word for word in words))
    assert told.code == 2 and line in told.error_line
