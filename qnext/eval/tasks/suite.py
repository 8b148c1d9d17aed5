"""Tasks by name, and a task in words as a prompt of exactly as many tokens as asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from qnext.errors import UsageError, did_you_mean
from qnext.eval.tasks import growing, recall, words
from qnext.eval.tasks.problem import NO_FRAME, ChatFrame, Encode, TaskShape, TaskText, WordProblem

RecallTask = Callable[[random.Random, TaskShape], TaskText]
GrowingTask = Callable[[random.Random, TaskShape, int], TaskText]

RECALL_TASKS: Mapping[str, RecallTask] = {
    "needle": recall.needle,
    "multi-key": recall.multi_key,
    "multi-value": recall.multi_value,
    "multi-query": recall.multi_query,
    "variables": recall.variables,
}
GROWING_TASKS: Mapping[str, GrowingTask] = {
    "pairs": growing.pairs,
    "copy": growing.copy,
    "parity": growing.parity,
    "boxes3": growing.boxes3,
    "boxes5": growing.boxes5,
    "addition": growing.addition,
}
TEXT_TASKS = (*RECALL_TASKS, *GROWING_TASKS)
WITH_DEPTH = ("needle", "multi-key", "multi-value", "multi-query", "pairs")  # where it says what stands there
_SLACK = 8  # tokens more than the answer has, for a word before it
_POOL_SENTENCES = 4096  # that are made; a haystack goes through them in an order of its own


def check_tasks(kinds: Sequence[str]) -> None:
    """Raises UsageError for a name that no task has."""
    for kind in kinds:
        if kind not in TEXT_TASKS:
            raise UsageError(f"no task {kind!r}{did_you_mean(kind, TEXT_TASKS)}; there are {', '.join(TEXT_TASKS)}")


@dataclass(frozen=True)
class TaskWriter:
    """Writes problems for one tokenizer. `filler` are sentences, of which `encode_filler` remembers the tokens;
    `answer_tokens` is what an answer may take beside its own."""

    encode: Encode
    encode_filler: Encode
    filler: Sequence[str]
    frame: ChatFrame = NO_FRAME
    answer_tokens: int = _SLACK

    @classmethod
    def of(
        cls, encode: Encode, *, frame: ChatFrame = NO_FRAME, answer_tokens: int = _SLACK, text: str = ""
    ) -> TaskWriter:
        """`text` is a haystack of the caller's own, used line by line; by default sentences are made."""
        made = words.sentences(random.Random("filler"))
        lines = text.splitlines(keepends=True) if text else list(islice(made, _POOL_SENTENCES))
        return cls(encode, cache(encode), lines, frame, answer_tokens)

    def problem(self, kind: str, shape: TaskShape, *, sample: int, seed: int) -> WordProblem:
        """The same for the same sample and seed. The haystack does not depend on the depth, so that a prefix cache
        serves the other depths. Raises UsageError where the length has no room for the task."""
        source = random.Random(f"{kind}/{shape.length}/{sample}/{seed}")
        if kind in RECALL_TASKS:
            return self._fitted(kind, shape, RECALL_TASKS[kind](source, shape), source)
        state = source.getstate()

        def drawn(size: int) -> TaskText:
            source.setstate(state)
            return GROWING_TASKS[kind](source, shape, size)

        least, most = 2, 4
        if self._room(drawn(least), shape) < 0:
            raise UsageError(f"{kind}: a length of {shape.length} tokens is too short")
        while self._room(drawn(most), shape) >= 0:
            least, most = most, 2 * most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if self._room(drawn(middle), shape) >= 0 else (least, middle)
        return self._fitted(kind, shape, drawn(least), source)

    def _answer_tokens(self, task: TaskText) -> int:
        return len(self.encode(f" {task.expected.text}")) + self.answer_tokens

    def _ends(self, task: TaskText) -> tuple[list[int], list[int]]:
        """What stands before and behind the facts and their filler."""
        question = task.question if self.frame is not NO_FRAME else f"{task.question}\n{task.begun}"
        return [*self.frame.head, *self.encode(task.intro)], [*self.encode(f"\n{question}"), *self.frame.tail]

    def _room(self, task: TaskText, shape: TaskShape) -> int:
        head, tail = self._ends(task)
        facts = sum(len(self.encode(fact)) for fact in task.facts)
        return shape.length - len(head) - len(tail) - facts - self._answer_tokens(task)

    def _fitted(self, kind: str, shape: TaskShape, task: TaskText, source: random.Random) -> WordProblem:
        room = self._room(task, shape)
        if room < 0:
            raise UsageError(f"{kind}: a length of {shape.length} tokens is {-room} too short")
        head, tail = self._ends(task)
        max_tokens = self._answer_tokens(task)
        if task.has_filler:
            body = self._haystack(task, shape, room, source)
        else:
            body, max_tokens = [], max_tokens + room  # a token or two that no item fills
        prompt = [*head, *body, *tail]
        assert len(prompt) + max_tokens == shape.length
        return WordProblem(kind, shape, prompt, max_tokens, task.expected)

    def _haystack(self, task: TaskText, shape: TaskShape, room: int, source: random.Random) -> list[int]:
        """Filler with the facts between its sentences. The first sentence is the end of one, which makes up the
        length."""
        pieces: list[list[int]] = []
        for sentence in self._sentences(random.Random(f"{shape.length}/{source.random()}")):
            if len(sentence) >= room:
                pieces.insert(0, sentence[len(sentence) - room :])
                break
            pieces.append(sentence)
            room -= len(sentence)
        places = [source.randint(0, len(pieces)) for _ in task.facts]
        if shape.depth is not None:
            places[0] = round(shape.depth * len(pieces))
        if task.keeps_order:
            places.sort()
        placed = sorted(zip(places, task.facts, strict=True), key=lambda each: each[0])
        for place, fact in reversed(placed):  # so that no place moves, and those of one place keep their order
            pieces.insert(place, self.encode(fact))
        return [token for piece in pieces for token in piece]

    def _sentences(self, source: random.Random) -> Iterator[list[int]]:
        while True:
            yield from filter(None, map(self.encode_filler, source.sample(self.filler, len(self.filler))))
