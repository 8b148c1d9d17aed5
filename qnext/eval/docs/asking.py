"""A question of a person about a folder, answered from the documents, with every citation looked up.

Where the documents are longer than the context, the lines around those that share the rarest words with the question
are taken (BM25, Robertson and Zaragoza 2009).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qnext.errors import UsageError
from qnext.eval.docs.judging import DocCitation, citations_in
from qnext.eval.docs.packing import Shelf
from qnext.eval.docs.reading import NumberedLine, SourceDocument
from qnext.eval.tasks.problem import NO_FRAME, ChatFrame, Examinee

_PASSAGE = 12  # lines that are chosen or left out together
_SATURATION, _LENGTH_SHARE = 1.2, 0.75  # k1 and b of BM25
_ASK = (
    "\nQuestion: {}\nAnswer from the documents alone. Behind each statement cite the place in brackets, the name of "
    "the document, a colon and the number of the line. Where the documents do not say it, say so."
)


@dataclass(frozen=True)
class CitedAnswer:
    """`citations` were looked up; one that leads nowhere has no text. `is_whole`: the model saw all documents."""

    text: str
    citations: tuple[DocCitation, ...]
    num_prompt_tokens: int
    is_whole: bool


def ask_documents(
    examinee: Examinee, documents: Sequence[SourceDocument], question: str, *, is_chat: bool, answer_tokens: int = 512
) -> CitedAnswer:
    """Raises UsageError where not even one passage fits."""
    frame = ChatFrame.of(examinee.encode_chat) if is_chat else NO_FRAME
    ending = _ASK.format(question) + ("" if is_chat else "\nAnswer:")
    head = [*frame.head, *examinee.encode("Documents with numbered lines:\n\n")]
    tail = [*examinee.encode(ending), *frame.tail]
    room = examinee.max_length - len(head) - len(tail) - answer_tokens
    packed = Shelf.of(documents, examinee.encode).whole(room)
    is_whole = packed is not None
    if packed is None:
        packed = Shelf.of(_chosen(examinee, documents, question, room), examinee.encode).whole(room)
    if packed is None:
        raise UsageError(f"no passage fits beside the question into {examinee.max_length} tokens")
    prompt = [*head, *packed.token_ids, *tail]
    (text,) = examinee.complete([prompt], max_tokens=answer_tokens)
    by_name = {document.name: document for document in documents}
    return CitedAnswer(text.strip(), tuple(citations_in(text, by_name)), len(prompt), is_whole)


def _chosen(examinee: Examinee, documents: Sequence[SourceDocument], question: str, room: int) -> list[SourceDocument]:
    """The best passages that fit together, in their order."""
    passages = [
        (document, document.lines[start : start + _PASSAGE])
        for document in documents
        for start in range(0, len(document.lines), _PASSAGE)
    ]
    scores = _scores([" ".join(line.text for line in lines) for _, lines in passages], question)
    kept: list[int] = []
    for index in sorted(range(len(passages)), key=lambda index: -scores[index]):
        document, lines = passages[index]
        cost = sum(len(examinee.encode(f"{line.number}| {line.text}\n")) for line in lines)
        cost += len(examinee.encode(f"=== {document.name} ===\n"))  # counted for each passage: never too little
        if cost <= room:
            kept.append(index)
            room -= cost
        elif kept:
            break
    chosen: dict[str, list[NumberedLine]] = {}
    for index in sorted(kept):
        document, lines = passages[index]
        chosen.setdefault(document.name, []).extend(lines)
    return [SourceDocument(d.name, d.form, tuple(chosen[d.name])) for d in documents if d.name in chosen]


def _scores(texts: Sequence[str], question: str) -> list[float]:
    words = [Counter(re.findall(r"\w+", text.casefold())) for text in texts]
    mean = sum(map(Counter.total, words)) / max(1, len(words)) or 1.0
    scores = [0.0] * len(texts)
    for word in set(re.findall(r"\w+", question.casefold())):
        having = sum(word in each for each in words)
        weight = math.log(1 + (len(words) - having + 0.5) / (having + 0.5))
        for index, each in enumerate(words):
            damping = _SATURATION * (1 - _LENGTH_SHARE + _LENGTH_SHARE * each.total() / mean)
            scores[index] += weight * each[word] * (_SATURATION + 1) / (each[word] + damping)
    return scores
