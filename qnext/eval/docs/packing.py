"""Documents as text with numbered lines, and as much of them around an answer as a length allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qnext.eval.docs.questions import DocQuestion
from qnext.eval.docs.reading import SourceDocument
from qnext.eval.tasks.problem import Encode


class PackedLine(NamedTuple):
    """A line as the model sees it, by its document and number, and its tokens."""

    document: str
    number: int
    token_ids: list[int]


class PackedText(NamedTuple):
    """Token ids of several documents, and where in them the answer begins, from 0 to 1."""

    token_ids: list[int]
    depth: float
    num_documents: int


@dataclass(frozen=True)
class Shelf:
    """All documents, one after another and again from the first, as lines of tokens. `heads` are their title lines."""

    lines: Sequence[PackedLine]
    heads: dict[str, list[int]]

    @classmethod
    def of(cls, documents: Sequence[SourceDocument], encode: Encode) -> Shelf:
        lines = [
            PackedLine(document.name, line.number, encode(f"{line.number}| {line.text}\n"))
            for document in documents
            for line in document.lines
        ]
        return cls(lines, {document.name: encode(f"=== {document.name} ===\n") for document in documents})

    @property
    def num_tokens(self) -> int:
        return sum(len(line.token_ids) for line in self.lines) + sum(map(len, self.heads.values()))

    def around(self, question: DocQuestion, *, room: int, depth: float) -> PackedText | None:
        """Lines of at most `room` tokens in all, all that the question needs among them, its answer as near to `depth`
        as can be; None where the needed lines alone are too long. Other documents fill what its own leaves."""
        wanted = [
            index
            for index, line in enumerate(self.lines)
            if line.document == question.document and line.number in question.needed
        ]
        answer = next(index for index in wanted if self.lines[index].number in question.places)
        first, last = wanted[0], wanted[-1]
        used = self._size(first, last)
        if used > room:
            return None
        before = self._size(first, answer) - len(self.lines[answer].token_ids)
        grows_up = grows_down = True
        while grows_up or grows_down:
            is_up = grows_up and (not grows_down or before < depth * used)
            index = first - 1 if is_up else last + 1
            if last - first + 1 >= len(self.lines):
                break
            cost = self._cost(index, first if is_up else last)
            if used + cost > room:
                grows_up, grows_down = grows_up and not is_up, grows_down and is_up
                continue
            first, last = (index, last) if is_up else (first, index)
            used, before = used + cost, before + (cost if is_up else 0)
        return self._packed(first, last, before)

    def whole(self, room: int) -> PackedText | None:
        """Everything, or None where it is too long."""
        return None if self.num_tokens > room else self._packed(0, len(self.lines) - 1, 0)

    def _packed(self, first: int, last: int, before: int) -> PackedText:
        token_ids: list[int] = []
        seen: list[str] = []
        for index in range(first, last + 1):
            line = self._at(index)
            if not seen or seen[-1] != line.document or index % len(self.lines) == 0:
                token_ids += self.heads[line.document]
                seen.append(line.document)
            token_ids += line.token_ids
        return PackedText(token_ids, before / len(token_ids), len(set(seen)))

    def _at(self, index: int) -> PackedLine:
        return self.lines[index % len(self.lines)]

    def _size(self, first: int, last: int) -> int:
        lines = [self._at(index) for index in range(first, last + 1)]
        return sum(len(line.token_ids) for line in lines) + len(self.heads[lines[0].document])

    def _cost(self, index: int, beside: int) -> int:
        """Of one more line beside another, and of a title where a document begins between them."""
        line, later = self._at(index), max(index, beside)
        is_new = line.document != self._at(beside).document or later % len(self.lines) == 0
        return len(line.token_ids) + (len(self.heads[line.document]) if is_new else 0)
