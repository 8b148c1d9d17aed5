"""Asks a model questions about documents: by kind, by length and by depth, with citations checked and times taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from qnext.errors import UsageError
from qnext.eval.docs.judging import DocVerdict, judge
from qnext.eval.docs.packing import Shelf
from qnext.eval.docs.questions import QUESTION_KINDS, DocQuestion, make_questions
from qnext.eval.docs.reading import SourceDocument
from qnext.eval.intervals import Interval, wilson
from qnext.eval.tasks.problem import NO_FRAME, ChatFrame, Examinee

_INTRO = "Documents with numbered lines:\n\n"
_ASK_CHAT = "\nQuestion: {}\nAnswer on one line, briefly and in the words of the documents. Then write Source: and the\
 name of the document, a colon and the number of the line that holds the answer."
_ASK_PLACE = "\nQuestion: {}\nAnswer with the name of the document, a colon and the number of the line."
_BEGUN = "\nAnswer:"


@dataclass(frozen=True)
class DocsPlan:
    """What is asked. Depths are where the answer is to stand, from 0 to 1; short documents have no room for all."""

    kinds: Sequence[str] = tuple(QUESTION_KINDS)
    lengths: Sequence[int] = (4096,)
    depths: Sequence[float] = (0.0, 0.5, 1.0)
    questions: int = 40  # of each length, over all depths and kinds
    seed: int = 0
    is_chat: bool = False
    answer_tokens: int = 64


@dataclass(frozen=True)
class AskedQuestion:
    """A question with the answer that came. `depth` is where the answer stood in the prompt."""

    question: DocQuestion
    length: int
    depth: float
    num_documents: int
    num_prompt_tokens: int
    num_answer_tokens: int
    seconds: float
    answer: str
    verdict: DocVerdict


class DocsShare(NamedTuple):
    """Questions that have something in common, and how they were answered. `cited_right` is the share of the answers
    with a citation whose cited line holds the expected answer; None where none was cited."""

    name: str
    num_questions: int
    right: Interval
    cited: Interval
    cited_right: Interval | None
    place: Interval


@dataclass(frozen=True)
class DocsReport:
    asked: tuple[AskedQuestion, ...]

    def shares(self) -> list[DocsShare]:
        """By kind, by length, by thirds of the depth, and of all."""
        groups = [(kind, [a for a in self.asked if a.question.kind == kind]) for kind in self._kinds()]
        lengths = sorted({each.length for each in self.asked})
        groups += [(f"{length:,} tokens", [a for a in self.asked if a.length == length]) for length in lengths]
        for name, low, high in (("begin", 0.0, 1 / 3), ("middle", 1 / 3, 2 / 3), ("end", 2 / 3, 1.01)):
            groups.append((f"in the {name}", [a for a in self.asked if low <= a.depth < high]))
        groups.append(("all", list(self.asked)))
        return [_share(name, asked) for name, asked in groups if asked]

    def cost(self, *, price_in: float = 0.0, price_out: float = 0.0) -> dict[str, float]:
        """Of a thousand such questions: tokens, hours one after another, and money by prices per million tokens."""
        count = len(self.asked)
        tokens_in = 1000 * sum(each.num_prompt_tokens for each in self.asked) / count
        tokens_out = 1000 * sum(each.num_answer_tokens for each in self.asked) / count
        return {
            "prompt_tokens": tokens_in,
            "answer_tokens": tokens_out,
            "hours": sum(each.seconds for each in self.asked) / count / 3.6,
            "money": (tokens_in * price_in + tokens_out * price_out) / 1e6,
        }

    def latencies(self) -> dict[int, tuple[float, float]]:
        """Length -> the median and the longest time of a question, in seconds."""
        found = {}
        for length in sorted({each.length for each in self.asked}):
            times = sorted(each.seconds for each in self.asked if each.length == length)
            found[length] = (times[len(times) // 2], times[-1])
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "shares": [_document(share) for share in self.shares()],
            "latency": {str(length): {"median": m, "max": most} for length, (m, most) in self.latencies().items()},
            "asked": [asdict(each) | {"verdict": each.verdict._asdict()} for each in self.asked],
        }

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(each.question.kind for each in self.asked))


def _document(share: DocsShare) -> dict[str, Any]:
    return {key: value._asdict() if isinstance(value, Interval) else value for key, value in share._asdict().items()}


def _share(name: str, asked: Sequence[AskedQuestion]) -> DocsShare:
    verdicts = [each.verdict for each in asked]
    cited = [verdict for verdict in verdicts if verdict.is_cited]
    count = len(verdicts)
    return DocsShare(
        name,
        count,
        wilson(sum(verdict.is_right for verdict in verdicts), count),
        wilson(len(cited), count),
        wilson(sum(verdict.holds for verdict in cited), len(cited)) if cited else None,
        wilson(sum(verdict.is_place for verdict in verdicts), count),
    )


def run_docs(
    examinee: Examinee,
    documents: Sequence[SourceDocument],
    plan: DocsPlan,
    *,
    on_answer: Callable[[AskedQuestion], object] = lambda asked: None,
) -> DocsReport:
    """One question after another, so that its time is its own. Raises UsageError where nothing can be asked."""
    if max(plan.lengths) > examinee.max_length:
        raise UsageError(f"a length of {max(plan.lengths)} is beyond the model's {examinee.max_length} tokens")
    questions = make_questions(documents, kinds=plan.kinds, seed=plan.seed)
    asking = _DocsExam(examinee, documents, plan)
    found: list[AskedQuestion] = []
    for length in plan.lengths:
        asked = 0
        for question in questions:
            if asked == plan.questions:
                break
            answered = asking.ask(question, length, plan.depths[asked % len(plan.depths)])
            if answered is not None:
                on_answer(answered)
                found.append(answered)
                asked += 1
    if not found:
        raise UsageError(f"no question fits into {max(plan.lengths)} tokens")
    return DocsReport(tuple(found))


class _DocsExam:
    """Prompts of documents for one model."""

    def __init__(self, examinee: Examinee, documents: Sequence[SourceDocument], plan: DocsPlan) -> None:
        self._examinee, self._plan = examinee, plan
        self._documents = {document.name: document for document in documents}
        self._shelf = Shelf.of(documents, examinee.encode)
        frame = ChatFrame.of(examinee.encode_chat) if plan.is_chat else NO_FRAME
        self._head, self._tail = [*frame.head, *examinee.encode(_INTRO)], frame.tail

    def ask(self, question: DocQuestion, length: int, depth: float) -> AskedQuestion | None:
        """None where the length is too short for it."""
        form = _ASK_PLACE if question.asks_for_place else _ASK_CHAT
        ending = form.format(question.text) + ("" if self._plan.is_chat else _BEGUN)
        tail = [*self._examinee.encode(ending), *self._tail]
        room = length - len(self._head) - len(tail) - self._plan.answer_tokens
        packed = self._shelf.around(question, room=room, depth=depth) if room > 0 else None
        if packed is None:
            return None
        prompt = [*self._head, *packed.token_ids, *tail]
        begun = time.perf_counter()
        (answer,) = self._examinee.complete([prompt], max_tokens=self._plan.answer_tokens)
        seconds = time.perf_counter() - begun
        return AskedQuestion(
            question,
            length,
            packed.depth,
            packed.num_documents,
            len(prompt),
            len(self._examinee.encode(answer)),
            seconds,
            answer,
            judge(question, answer, self._documents),
        )
