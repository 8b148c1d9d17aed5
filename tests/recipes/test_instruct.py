"""Questions with known answers, and the recipes that teach them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.cli import main
from qnext.recipes import instruct
from qnext.recipes.questions import messages, questions
from qnext.session.folder import open_folder
from qnext.text.chat import ChatFormat
from qnext.text.samples import sample_of
from qnext.training.sources import Corpus, TextFile
from tests.text_folders import save_plain


def test_questions_depend_on_the_seed_alone_and_sides_share_nothing() -> None:
    train, held_out = (questions(600, seed=3, held_out=side) for side in (False, True))
    assert train == questions(600, seed=3, held_out=False) != questions(600, seed=4, held_out=False)
    assert not {each.key for each in train} & {each.key for each in held_out}
    assert len({each.text for each in held_out}) == 600
    assert {each.kind for each in train} == {each.kind for each in held_out}


def test_answers_are_right() -> None:
    """By other ways than those that made them."""
    for each in [*questions(800, seed=0, held_out=False), *questions(200, seed=0, held_out=True)]:
        words = each.key.split()
        if each.kind == "addition":
            assert int(each.answer) == sum(map(int, each.key.split("+")))
        elif each.kind == "subtraction":
            left, right = map(int, each.key.split("-"))
            assert int(each.answer) + right == left
        elif each.kind == "comparison":
            assert each.answer in words[1:] and all(int(word) <= int(each.answer) for word in words[1:])
        elif each.kind == "reversal":
            assert list(reversed(each.answer.split())) == words[1:]
        elif each.kind in ("count", "last letter"):
            assert each.answer == (str(len(words) - 1) if each.kind == "count" else words[-1])
        elif each.kind == "call":
            name, _, rest = each.key.partition("(")
            numbers = json.loads(rest[:-1])
            assert each.answer == str({"max": max, "min": min, "len": len, "sorted": sorted}[name](numbers))  # type: ignore[operator]
        else:
            assert callable(getattr(__import__(each.answer), words[0]))
        assert all(word in each.text for word in words[1:] if each.kind in ("comparison", "reversal", "count"))


def test_a_question_is_a_sample_with_or_without_its_thought() -> None:
    (question,) = questions(1, seed=0, held_out=False)
    plain, thinking = (sample_of(messages(question, thinks=thinks)).messages for thinks in (False, True))
    assert [each.content for each in plain] == [each.content for each in thinking] == [question.text, question.answer]
    assert (plain[1].reasoning_content, thinking[1].reasoning_content) == (None, question.thought)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of a few questions and texts."""
    for name, whole in instruct.RECIPES.items():
        monkeypatch.setitem(instruct.RECIPES, name, replace(whole, num_questions=40, num_bytes=3000, num_tested=4))
    texts = [TextFile(f"{n}.py", str(n), f"def f{n}(x):\n    return x + {n}\n" * 5) for n in range(4)]
    corpus = Corpus(texts[:3], texts[3:], "four functions")
    monkeypatch.setattr(instruct, "standard_library", lambda **options: corpus)


@pytest.mark.parametrize("name", ["instruct", "thinking"])
def test_a_recipe_leaves_a_model_that_chats_and_tells_how_much_it_learnt(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_small(monkeypatch)
    base, out = save_plain(tmp_path / "base"), tmp_path / "run"
    command = ["train", "sft", "--from", str(base), "--recipe", name, "--out", str(out), "--set", "total_steps=2"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "held-out questions right" in line]
    assert [line.split(":")[0] for line in told] == ["step 0", "step 2"]
    assert all("of 4 held-out" in line and "bits per byte" in line for line in told)
    folder = open_folder(str(out / "model"))
    assert ChatFormat.for_folder(folder.path).name == name
    generation = json.loads((out / "model" / "generation_config.json").read_text())
    assert generation["do_sample"] is False


def test_an_unknown_recipe_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"instrukt": "did you mean instruct?", "instruct --data x": "--recipe brings its own data"}
    for words, message in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(["train", "sft", "--from", "base", "--out", str(tmp_path / "run"), "--recipe", *words.split()])
        assert stop.value.code == 2 and message in capsys.readouterr().err
