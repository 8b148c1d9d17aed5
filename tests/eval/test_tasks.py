"""Tasks in words: the length to the token for several tokenizers, answers that a reader finds, and what is counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qnext.diagnostics.depth_map import maps_of, svg_of_maps, write_depth_maps
from qnext.errors import UsageError
from qnext.eval.tasks import TEXT_TASKS, SuitePlan, TaskShape, run_suite
from qnext.eval.tasks.problem import ChatFrame, Expected
from qnext.eval.tasks.suite import RECALL_TASKS, WITH_DEPTH, TaskWriter


class Words:
    """A tokenizer of pieces: a token is a word with its space, a number of up to three digits, or a sign."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.number: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in re.findall(r" ?[A-Za-z]+| ?\d{1,3}|\s|.", text):
            if piece not in self.number:
                self.number[piece] = len(self.pieces)
                self.pieces.append(piece)
            ids.append(self.number[piece])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


class Bytes:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


class Reader:
    """Asks nobody: answers by a function of the prompt's text."""

    max_length = 100_000

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.words, self.answer = Words(), answer
        self.asked: list[str] = []

    def encode(self, text: str) -> list[int]:
        return self.words.encode(text)

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(f"[user] {text}\n[assistant] ")

    def complete(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[str]:
        texts = [self.words.decode(prompt) for prompt in prompts]
        self.asked += texts
        return [self.answer(text) for text in texts]

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        texts = [(self.words.decode(before), self.words.decode(after).strip()) for before, after in pairs]
        return [0.0 if ending in self.answer(prompt) else -9.0 for prompt, ending in texts]


def solve(text: str) -> str:
    """By reading, as a person would."""
    if found := re.search(r"(?:is|are) the (?:\d+ )?secret numbers? of ([^?]+) in the text above", text):
        names = re.split(r", | and ", found[1])
        return " ".join(value for name in names for value in re.findall(rf"secret number of {name} is (\d+)\.", text))
    if found := re.search(r"value of variable (\w+)", text):
        values: dict[str, str] = {}
        for name, value in re.findall(r"Variable (\w+) is set to (?:the value of )?(\w+)\.", text):
            values[name] = values.get(value, value)
        return values[found[1]]
    if found := re.search(r"Which number stands at (\w+)", text):
        return re.search(rf"{found[1]}: (\d+)", text)[1]  # type: ignore[index]
    if found := re.search(r"Words: (.*)\n", text):
        return found[1]
    if found := re.search(r"done to it: (.*)\.", text):
        return "It is on." if found[1].split().count("flip") % 2 else "off"
    if found := re.search(r"again and again: (.*)\.", text):
        held = list(re.search(r"hold ([A-E ]+)\.", text)[1].split())  # type: ignore[index]
        for swap in found[1].split():
            one, two = (int(box) - 1 for box in swap.split("-"))
            held[one], held[two] = held[two], held[one]
        return " ".join(held)
    left, right = re.search(r"What is (\d+) \+ (\d+)", text).groups()  # type: ignore[union-attr]
    return str(int(left) + int(right))


@pytest.mark.parametrize("kind", TEXT_TASKS)
@pytest.mark.parametrize("tokenizer", [Words, Bytes])
@pytest.mark.parametrize("is_chat", [False, True])
def test_the_length_is_hit(kind: str, tokenizer: type[Words] | type[Bytes], is_chat: bool) -> None:
    own = tokenizer()
    frame = ChatFrame.of(lambda text: own.encode(f"<u>{text}</u>\nA:"))
    assert (own.decode(frame.head), own.decode(frame.tail)) == ("<u>", "</u>\nA:")
    writer = TaskWriter.of(own.encode, frame=frame) if is_chat else TaskWriter.of(own.encode)
    for length in (900, 1777):
        shape = TaskShape(length, depth=0.5 if kind in WITH_DEPTH else None)
        problem = writer.problem(kind, shape, sample=1, seed=3)
        assert len(problem.prompt_ids) + problem.max_tokens == length
        assert problem.max_tokens >= len(own.encode(f" {problem.expected.text}"))
        text = own.decode(problem.prompt_ids)
        assert text.endswith("</u>\nA:") is is_chat
        if kind in RECALL_TASKS:
            assert all(answer in text for answer in problem.expected.answers)
        assert problem.expected.is_answered_by(problem.expected.text)
        assert not any(problem.expected.is_answered_by(other) for other in problem.expected.alternatives)
        assert writer.problem(kind, shape, sample=1, seed=3) == problem
        assert writer.problem(kind, shape, sample=2, seed=3) != problem


@pytest.mark.parametrize("is_chat", [False, True])
def test_who_reads_is_right_and_who_guesses_is_not(is_chat: bool) -> None:
    plan = SuitePlan(TEXT_TASKS, [400, 1000], [0.0, 1.0], samples=3, is_chat=is_chat)
    report = run_suite(Reader(solve), plan)
    assert {kind: report.total(kind).value for kind in report.kinds} == dict.fromkeys(TEXT_TASKS, 1.0)
    assert len(report.cells) == len(TEXT_TASKS) * 2 + len(WITH_DEPTH) * 2
    assert sum(cell.num_problems for cell in report.cells) == plan.num_problems
    wrong = run_suite(Reader(lambda text: "1 2 3 and A B C"), plan)
    assert {wrong.total(kind).value for kind in wrong.kinds} == {0.0}
    assert wrong.total("needle").high > 0.1 and wrong.cells[0].examples[0][1] == "1 2 3 and A B C"


def test_the_depth_is_where_the_fact_stands() -> None:
    reader = Reader(solve)
    run_suite(reader, SuitePlan(["multi-key"], [3000], [0.0, 0.5, 1.0], samples=1))
    places = []
    for text in reader.asked:
        name = re.search(r"number of ([a-z ]+) is$", text)[1]  # type: ignore[index]
        places.append(text.index(f"secret number of {name} is") / len(text))
    assert places[0] < 0.1 < 0.4 < places[1] < 0.6 < 0.9 < places[2]
    shared = [_common(reader.asked[0], each) for each in reader.asked[1:]]
    filler = [re.sub(r"The secret number of [a-z ]+ is \d+\. ", "", text) for text in reader.asked]
    assert filler[0] == filler[1] == filler[2] and min(shared) > 50


def _common(left: str, right: str) -> int:
    return next(place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)


def test_the_likeliest_of_alternatives() -> None:
    plan = SuitePlan(["needle", "pairs"], [500], [0.5], samples=4, ranks_alternatives=True)
    (needle, pairs) = run_suite(Reader(solve), plan).cells
    assert needle.ranked is not None and pairs.ranked is not None
    assert needle.ranked.value == pairs.ranked.value == 1.0 and needle.num_alternatives == 8
    (blind, _) = run_suite(Reader(lambda text: ""), plan).cells
    assert blind.ranked is not None and blind.ranked.value == 0.0


def test_answers_are_what_stands_first_behind_the_thought() -> None:
    expected = Expected(("12", "7"), r"\d+")
    assert expected.is_answered_by("They are 12 and 7, not 9.") and not expected.is_answered_by("9, 12, 7")
    assert expected.is_answered_by("Is it 9? 8?\n</think>\n\n12, 7") and not expected.is_answered_by("7, 12")
    assert Expected(("12", "7"), r"\d+", is_ordered=False).is_answered_by("7, 12")
    assert not Expected(("7",), r"\d+").is_answered_by("77")


def test_what_cannot_be_asked_is_told() -> None:
    with pytest.raises(UsageError, match="did you mean needle"):
        SuitePlan(["needles"], [100])
    with pytest.raises(UsageError, match="too short"):
        run_suite(Reader(solve), SuitePlan(["needle"], [20]))
    with pytest.raises(UsageError, match="beyond the model's 100000 tokens"):
        run_suite(Reader(solve), SuitePlan(["needle"], [100_001]))


def test_the_picture_has_every_cell() -> None:
    report = run_suite(Reader(solve), SuitePlan(["needle", "copy"], [400, 700], [0.0, 0.5, 1.0], samples=2))
    maps = maps_of(report)
    assert [each.shares_PS.shape for each in maps] == [(3, 2), (1, 2)]
    picture = svg_of_maps(maps, title="a <model>")
    assert picture.count("<rect") == 1 + 8 and "a &lt;model&gt;" in picture and picture.count("100%</text>") == 8


def test_the_table_and_the_png(tmp_path: Path) -> None:
    report = run_suite(Reader(solve), SuitePlan(["needle"], [400, 1024], [0.0, 1.0], samples=2))
    assert report.table().splitlines()[:3] == [
        "needle   100.0% [67.6%, 100.0%] exact",
        "  depth     400      1K",
        "     0%    100%    100%",
    ]
    write_depth_maps(tmp_path / "a.png", maps_of(report), title="")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
