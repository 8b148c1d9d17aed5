"""Questions that documents answer by their own structure, each with its answer and the places where it stands.

A question is asked only where its answer is the only one in all documents.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from qnext.errors import UsageError, did_you_mean
from qnext.eval.docs.reading import CODE, SourceDocument

_HEADING = re.compile(r"(#{1,6})\s+(.*\S)")
_PAIR = re.compile(
    r"\s*(?:[-*]\s+)?[`*\"']*([A-Za-z][\w .-]{2,40}?)[`*\"']*\s*[:=]\s+[`*\"']*([^|{}\[\]]{1,60}?)[`*\"',;]*"
)
_DEFINITION = re.compile(r"\s*(?:async\s+)?(?:def|class|func|fn|function|struct|interface)\s+([A-Za-z_]\w*)")
_WORD = re.compile(r"[A-Za-z][A-Za-z-]{4,}")
_FENCE = ("```", "~~~")
_LEAST, _MOST = 30, 200  # characters of a sentence that is quoted


class DocQuestion(NamedTuple):
    """`needed` are the line numbers that must be in sight, `places` those of them where the answer itself stands."""

    kind: str
    text: str
    answer: str
    document: str
    places: tuple[int, ...]
    needed: tuple[int, ...]
    asks_for_place: bool = False


class DocCounts(NamedTuple):
    """The documents, and how often each line and word is in all of them."""

    documents: Sequence[SourceDocument]
    lines: Counter[str]
    words: Counter[str]
    headings: Counter[str]


def _counts(documents: Sequence[SourceDocument]) -> DocCounts:
    lines, words, headings = Counter[str](), Counter[str](), Counter[str]()
    for document in documents:
        for line in document.lines:
            lines[_plain(line.text)] += 1
            words.update(word.casefold() for word in _WORD.findall(line.text))
        headings.update(_plain(title) for _, title, _ in _sections(document))
    return DocCounts(documents, lines, words, headings)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def make_questions(documents: Sequence[SourceDocument], *, kinds: Sequence[str], seed: int) -> list[DocQuestion]:
    """All questions of these kinds, mixed so that each beginning has each kind as often as there are enough.

    Raises UsageError for an unknown kind, and where the documents give no question.
    """
    for kind in kinds:
        if kind not in QUESTION_KINDS:
            raise UsageError(f"no kind of question {kind!r}{did_you_mean(kind, QUESTION_KINDS)}")
    source, counts = random.Random(seed), _counts(documents)
    queues: list[list[DocQuestion]] = []
    for kind in kinds:
        found = [each for document in documents for each in QUESTION_KINDS[kind](document, counts, source)]
        source.shuffle(found)
        queues.append(found)
    mixed: list[DocQuestion] = []
    while any(queues):
        mixed += [queue.pop() for queue in queues if queue]
    if not mixed:
        raise UsageError("the documents give no question of these kinds")
    return mixed


def _sections(document: SourceDocument) -> Iterator[tuple[int, str, int]]:
    """Number of the line, title and level of each heading; not those in fenced code."""
    if document.form == CODE:
        return
    is_code = False
    for line in document.lines:
        if line.text.lstrip().startswith(_FENCE):
            is_code = not is_code
        found = None if is_code else _HEADING.fullmatch(line.text)
        if found:
            yield line.number, found[2].strip("# "), len(found[1])


def _quotable(document: SourceDocument, counts: DocCounts) -> Iterator[tuple[int, str]]:
    """Lines that are in all documents once, of a length that can be quoted, without headings and tables."""
    for line in document.lines:
        text = line.text.strip()
        is_plain = _LEAST <= len(text) <= _MOST and not text.startswith(("#", "|", *_FENCE))
        if is_plain and counts.lines[_plain(text)] == 1 and len(_WORD.findall(text)) >= 3:
            yield line.number, text


def _section(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """Which heading stands above a sentence."""
    sections = list(_sections(document))
    for number, text in _quotable(document, counts):
        above = [(at, title) for at, title, _ in sections if at < number]
        if above and counts.headings[_plain(above[-1][1])] == 1:
            at, title = above[-1]
            asked = f'Which heading stands directly above the section that holds "{text}"?'
            yield DocQuestion("section", asked, title, document.name, (at,), (at, number))


def _order(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """Which heading comes next."""
    sections = list(_sections(document))
    for (at, title, _), (after, following, _) in pairwise(sections):
        if counts.headings[_plain(title)] == counts.headings[_plain(following)] == 1:
            asked = f'Which heading comes next after the heading "{title}" in {document.name}?'
            yield DocQuestion("order", asked, following, document.name, (after,), (at, after))


def _value(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """What a key is set to, or how a term is defined."""
    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for line in document.lines:
        pair = _PAIR.fullmatch(line.text)
        if pair and len(line.text) < _MOST and not line.text.lstrip().startswith(("#", "|")):
            found[_plain(pair[1])].append((line.number, pair[1].strip(), pair[2].strip()))
    for same in found.values():
        if len(same) == 1 and len(same[0][2]) > 1:
            number, key, value = same[0]
            asked = f'What is the value or meaning of "{key}" in {document.name}?'
            yield DocQuestion("value", asked, value, document.name, (number,), (number,))


def _cell(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """A cell of a table, by the first cell of its row and the head of its column."""
    head: list[str] = []
    head_number = 0
    for line in document.lines:
        cells = [cell.strip(" `*") for cell in line.text.strip().strip("|").split("|")]
        if not line.text.lstrip().startswith("|") or len(cells) < 2:
            head = []
        elif not head:
            head, head_number = cells, line.number
        elif len(cells) == len(head) and not set("".join(cells)) <= set("-: "):
            column = source.randrange(1, len(cells))
            is_alone = sum(text.startswith(_plain(f"| {cells[0]}")) for text in counts.lines) <= 1
            if cells[0] and head[column] and 1 < len(cells[column]) <= 80 and is_alone:
                asked = (
                    f'What stands in the column "{head[column]}" in the row "{cells[0]}" of a table in {document.name}?'
                )
                needed = (head_number, line.number)
                yield DocQuestion("cell", asked, cells[column], document.name, (line.number,), needed)


def _definition(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """Which function or class holds a line: the nearest definition above it that is less indented."""
    if document.form != CODE:
        return
    above: list[tuple[int, int, str]] = []  # indent, number, name
    for line in document.lines:
        text = line.text.strip()
        if not text:
            continue
        indent = len(line.text) - len(line.text.lstrip())
        above = [each for each in above if each[0] < indent]
        found = _DEFINITION.match(line.text)
        if found:
            above.append((indent, line.number, found[1]))
        elif above and 15 <= len(text) <= _MOST and counts.lines[_plain(text)] == 1:
            _, number, name = above[-1]
            asked = f"Which function or class in {document.name} holds the line `{text}`?"
            yield DocQuestion("definition", asked, name, document.name, (number,), (number, line.number))


def _cloze(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """The missing word of a sentence: one that all documents have only once or twice."""
    for number, text in _quotable(document, counts):
        rare = [word for word in _WORD.findall(text) if counts.words[word.casefold()] <= 2]
        if rare:
            word = source.choice(rare)
            blank = re.sub(rf"\b{word}\b", "____", text, count=1)
            asked = f'Which word is missing in "{blank}"?'
            yield DocQuestion("cloze", asked, word, document.name, (number,), (number,))


def _quote(document: SourceDocument, counts: DocCounts, source: random.Random) -> Iterator[DocQuestion]:
    """Where a line stands: the place is the answer."""
    for number, text in _quotable(document, counts):
        asked = f'In which document and line stands "{text}"?'
        yield DocQuestion("quote", asked, f"{document.name}:{number}", document.name, (number,), (number,), True)


QUESTION_KINDS: Mapping[str, Callable[[SourceDocument, DocCounts, random.Random], Iterator[DocQuestion]]] = {
    "section": _section,
    "order": _order,
    "value": _value,
    "cell": _cell,
    "definition": _definition,
    "cloze": _cloze,
    "quote": _quote,
}
