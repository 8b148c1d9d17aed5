"""Whether an answer holds what was expected, and whether what it cites holds it too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qnext.eval.docs.questions import DocQuestion
from qnext.eval.docs.reading import SourceDocument

_THOUGHT_END = "</think>"
_MAX_ANSWER = 240  # characters: a model that repeats the documents has not answered


class DocCitation(NamedTuple):
    """A document and a line, or a page, that an answer names; `text` is what stands there, None where nothing does."""

    document: str
    number: int
    text: str | None


class DocVerdict(NamedTuple):
    """`is_right`: the answer. `is_cited`: some citation leads somewhere. `holds`: what it cites holds the expected
    answer. `is_place`: it cites the very place."""

    is_right: bool
    is_cited: bool
    holds: bool
    is_place: bool


def plain(text: str) -> str:
    """Without case, marks and spaces between words."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def citations_in(answer: str, documents: Mapping[str, SourceDocument]) -> list[DocCitation]:
    """Names of documents with a number behind, such as "manual.md:12", "[manual.md, line 12]" or "manual.md#L12"."""
    names = "|".join(re.escape(name) for name in sorted(documents, key=len, reverse=True))
    found = re.findall(rf"({names})\W{{0,4}}(?:lines?|page|L)?\W{{0,2}}(\d+)", answer.rpartition(_THOUGHT_END)[2])
    return [DocCitation(name, int(number), documents[name].at(int(number)) or None) for name, number in found]


def judge(question: DocQuestion, answer: str, documents: Mapping[str, SourceDocument]) -> DocVerdict:
    """The first line counts as the answer, and all of it for citations."""
    said = answer.rpartition(_THOUGHT_END)[2].strip()
    cited = [each for each in citations_in(answer, documents) if each.text is not None]
    right_place = [each for each in cited if each.document == question.document and each.number in question.places]
    if question.asks_for_place:
        return DocVerdict(
            bool(cited[:1] and cited[0] in right_place), bool(cited), bool(right_place), bool(right_place)
        )
    first = next((line for line in said.splitlines() if line.strip()), "")[:_MAX_ANSWER]
    expected = plain(question.answer)
    is_right = _holds(plain(_without(first, cited)), expected)
    return DocVerdict(
        is_right, bool(cited), any(_holds(plain(each.text or ""), expected) for each in cited), bool(right_place)
    )


def _without(text: str, cited: Sequence[DocCitation]) -> str:
    """Names of documents are no answers."""
    for each in cited:
        text = text.replace(each.document, " ")
    return text


def _holds(text: str, expected: str) -> bool:
    return bool(expected) and f" {expected} " in f" {text} "
