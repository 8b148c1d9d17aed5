"""Questions about documents: answers that stand where they are said to, prompts within their length, and verdicts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qnext.errors import UsageError
from qnext.eval.docs import QUESTION_KINDS, DocQuestion, DocsPlan, make_questions, read_folder, run_docs
from qnext.eval.docs.asking import ask_documents
from qnext.eval.docs.judging import judge, plain
from qnext.eval.docs.packing import Shelf
from qnext.eval.docs.reading import HTML, NumberedLine, SourceDocument
from tests.eval.test_tasks import Words

MANUAL = """# The harbor manual

This manual was written for everybody who works at the harbor.

## Opening hours

The northern gate is closed whenever the wind exceeds twelve knots.
- Capacity: forty vessels
- **Supervisor**: Margarethe Olsen

## Fees

Every vessel pays before departure, except those of the coast guard.

| vessel | fee | deposit |
|---|---|---|
| ketch | 17 crowns | 40 crowns |
| schooner | 29 crowns | 85 crowns |

## Accidents

Report collisions to the lighthouse immediately, by radio or signal flag.
"""
PAGE = """<html><head><title>x</title><script>var hidden = "nothing here";</script></head><body>
<h1>Repair yard</h1>
<p>The yard repairs wooden
hulls between October and March every winter.</p>
<h2>Paint</h2>
<p>Copper paint must never be used on aluminium rudders &amp; keels.</p>
<table><tr><th>colour</th><th>price</th></tr><tr><td>crimson</td><td>12 crowns</td></tr></table>
</body></html>
"""
CODE = '''"""Prices."""

RATE = 3

def fee_of(vessel):
    surcharge = vessel.length * RATE
    return surcharge + vessel.base

class Ledger:
    def total(self):
        return sum(entry.amount for entry in self.entries)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    (root / "manual.md").write_text(MANUAL)
    (root / "sub").mkdir()
    (root / "sub" / "yard.html").write_text(PAGE)
    (root / "prices.py").write_text(CODE)
    (root / "settings.toml").write_text('port = 8123\nowner = "Ingrid Dahl"\n')
    (root / ".hidden.md").write_text("# Never read\n")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[SourceDocument]:
    return read_folder(folder)


def test_lines_keep_their_numbers(documents: list[SourceDocument]) -> None:
    by_name = {document.name: document for document in documents}
    assert list(by_name) == ["manual.md", "prices.py", "settings.toml", "sub/yard.html"]
    assert by_name["manual.md"].at(7).startswith("The northern gate")
    page = by_name["sub/yard.html"]
    assert page.form == HTML and [line.number for line in page.lines] == [1, 2, 3, 5, 6, 7, 7]
    assert [line.text for line in page.lines][1:3] == [
        "# Repair yard",
        "The yard repairs wooden hulls between October and March every winter.",
    ]
    assert "| crimson | 12 crowns |" in page.at(7) and "& keels" in page.at(6)


def test_every_kind_asks_for_what_stands_there(documents: list[SourceDocument]) -> None:
    by_name = {document.name: document for document in documents}
    questions = make_questions(documents, kinds=tuple(QUESTION_KINDS), seed=3)
    assert {question.kind for question in questions} == set(QUESTION_KINDS)
    for question in questions:
        assert set(question.places) <= set(question.needed)
        if not question.asks_for_place:
            stands = " ".join(by_name[question.document].at(place) for place in question.places)
            assert plain(question.answer) in plain(stands), question
            assert question.kind in ("order", "definition") or question.answer not in question.text
    asked = {question.text: question.answer for question in questions}
    assert asked['Which heading comes next after the heading "Fees" in manual.md?'] == "Accidents"
    assert asked['What is the value or meaning of "Supervisor" in manual.md?'] == "Margarethe Olsen"
    assert asked['What is the value or meaning of "owner" in settings.toml?'] == "Ingrid Dahl"
    assert asked["Which function or class in prices.py holds the line `surcharge = vessel.length * RATE`?"] == "fee_of"
    sentence = "Report collisions to the lighthouse immediately, by radio or signal flag."
    assert asked[f'Which heading stands directly above the section that holds "{sentence}"?'] == "Accidents"
    cells = {question.text: question.answer for question in questions if question.kind == "cell"}
    for text, answer in cells.items():
        column, row = re.search(r'column "(\w+)" in the row "(\w+)"', text).groups()  # type: ignore[union-attr]
        values = {"ketch": ("17", "40"), "schooner": ("29", "85"), "crimson": ("12",)}[row]
        assert answer == f"{values[column == 'deposit']} crowns"
    assert len(cells) == 3
    assert make_questions(documents, kinds=("cloze",), seed=1) == make_questions(documents, kinds=("cloze",), seed=1)


@pytest.mark.parametrize("room", [90, 200, 10_000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_what_is_needed_is_in_sight(documents: list[SourceDocument], room: int, depth: float) -> None:
    words = Words()
    shelf = Shelf.of(documents, words.encode)
    for question in make_questions(documents, kinds=tuple(QUESTION_KINDS), seed=0):
        packed = shelf.around(question, room=room, depth=depth)
        if packed is None:
            assert room == 90
            continue
        text = words.decode(packed.token_ids)
        assert len(packed.token_ids) <= room and 0 <= packed.depth < 1
        found = re.findall(r"^=== (.*) ===$|^(\d+)\| ", text, re.M)
        name, seen = "", set()
        for title, number in found:
            name = title or name
            seen.add((name, int(number or 0)))
        assert {(question.document, number) for number in question.needed} <= seen
        if room == 200 and len(question.needed) == 1:
            assert abs(packed.depth - depth) < 0.3
        if room == 10_000:
            assert packed.num_documents == 4 and len(packed.token_ids) <= shelf.num_tokens + 20


class Clerk:
    """Answers by a function of the prompt's text."""

    max_length = 5000

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.words, self.answer = Words(), answer
        self.encode = self.words.encode

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(f"[user] {text}\n[assistant] ")

    def complete(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[str]:
        return [self.answer(self.words.decode(prompt)) for prompt in prompts]

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        raise AssertionError("not asked")


@pytest.mark.parametrize("is_chat", [False, True])
def test_who_knows_is_right_and_cites_right(documents: list[SourceDocument], is_chat: bool) -> None:
    questions = make_questions(documents, kinds=tuple(QUESTION_KINDS), seed=0)

    def knows(prompt: str) -> str:
        question = next(each for each in questions if f"Question: {each.text}\n" in prompt)
        return f" {question.answer}\nSource: {question.document}, line {question.places[0]}"

    plan = DocsPlan(lengths=(600,), questions=20, is_chat=is_chat)
    report = run_docs(Clerk(knows), documents, plan)
    every = report.shares()[-1]
    assert (every.num_questions, every.right.value, every.place.value) == (20, 1.0, 1.0)
    assert every.cited_right is not None and every.cited_right.value == 1.0
    assert all(each.num_prompt_tokens + plan.answer_tokens <= 600 for each in report.asked)
    assert report.cost(price_in=2.0, price_out=4.0)["money"] == pytest.approx(
        sum(2 * each.num_prompt_tokens + 4 * each.num_answer_tokens for each in report.asked) / 20 / 1000
    )
    invents = run_docs(Clerk(lambda prompt: "Nothing of this.\nSource: manual.md:3"), documents, plan)
    every = invents.shares()[-1]
    assert every.right.value == 0 and every.cited.value == 1 and every.cited_right is not None
    assert every.cited_right.value < 0.2


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Margarethe Olsen (manual.md:9)", (True, True, True, True)),
        ("The supervisor is margarethe olsen.\nSource: [manual.md, line 9]", (True, True, True, True)),
        ("Margarethe Olsen\nSource: manual.md:8", (True, True, False, False)),
        ("Margarethe Olsen\nSource: manual.md:999", (True, False, False, False)),
        ("Margarethe\nmanual.md#L9", (False, True, True, True)),
        ("I do not know.\nIt is Margarethe Olsen", (False, False, False, False)),
        ("Margarethe Olsen? No.\n</think>\n\nForty", (False, False, False, False)),
    ],
)
def test_verdicts(documents: list[SourceDocument], answer: str, verdict: tuple[bool, ...]) -> None:
    question = DocQuestion("value", "", "Margarethe Olsen", "manual.md", (9,), (9,))
    assert judge(question, answer, {document.name: document for document in documents}) == verdict


def test_a_name_of_a_document_is_no_answer(documents: list[SourceDocument]) -> None:
    question = DocQuestion("section", "", "manual", "manual.md", (1,), (1,))
    assert not judge(question, "manual.md:7", {document.name: document for document in documents}).is_right


@pytest.mark.parametrize("max_length", [5000, 260])
def test_a_question_of_ones_own(documents: list[SourceDocument], max_length: int) -> None:
    """Where the documents are too long, the passage with the words of the question is in sight."""
    clerk = Clerk(lambda prompt: "Not on rudders [sub/yard.html:6]." if "aluminium rudders" in prompt else "Unknown.")
    clerk.max_length = max_length
    answer = ask_documents(clerk, documents, "Where must copper paint not be used?", is_chat=False, answer_tokens=20)
    assert answer.is_whole == (max_length == 5000) and answer.num_prompt_tokens <= max_length - 20
    (citation,) = answer.citations
    assert citation.text is not None and "aluminium" in citation.text


def test_pdf_pages(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    content = b"BT /F1 12 Tf 72 700 Td (The keeper is called Solveig.) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body, places = b"%PDF-1.4\n", b""
    for number, each in enumerate(objects, 1):
        places += b"%010d 00000 n \n" % len(body)
        body += b"%d 0 obj%s endobj\n" % (number, each)
    end = b"trailer<</Root 1 0 R/Size 6>>\nstartxref\n%d\n%%%%EOF\n" % len(body)
    (tmp_path / "a.pdf").write_bytes(body + b"xref\n0 6\n0000000000 65535 f \n" + places + end)
    (document,) = read_folder(tmp_path)
    assert document.lines == (NumberedLine(1, "The keeper is called Solveig."),)
    (tmp_path / "a.pdf").write_bytes(b"no PDF")
    with pytest.raises(UsageError, match="no readable PDF"):
        read_folder(tmp_path)


def test_what_cannot_be_asked_is_told(tmp_path: Path, documents: list[SourceDocument]) -> None:
    with pytest.raises(UsageError, match="no readable document"):
        read_folder(tmp_path)
    with pytest.raises(UsageError, match="did you mean cloze"):
        make_questions(documents, kinds=("closes",), seed=0)
    with pytest.raises(UsageError, match="no question fits into 60 tokens"):
        run_docs(Clerk(str), documents, DocsPlan(lengths=(60,)))
