"""After a step that failed: whose fault it was, and how the others go on. Integers only, no torch.

A step of one request that fails is that request's failure. The requests of any other step go back to the queue, their
caches being spoiled, and run apart from each other until each is past the place where the step failed: the one that
fails there alone was the culprit. Where nobody does, the step failed for what they were together, and requests that it
happens to a second time stay apart. So nobody ends for another's fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from qnext.engine.policy.step import SequencePlan


class Planned(Protocol):
    """Something of one request that may run in a step."""

    @property
    def id(self) -> str: ...

    @property
    def start(self) -> int:
        """Tokens that are computed before it."""


AnyChunk = TypeVar("AnyChunk", bound=Planned)


class Recovery:
    """Who runs apart. Each request that does has steps of its own, all others share theirs; they take turns."""

    def __init__(self) -> None:
        self._apart_until: dict[str, int] = {}  # steps of its own until so many tokens are computed
        self._num_suspected: Counter[str] = Counter()  # steps that failed with it and others, and nobody was found
        self._num_choices = 0

    def set_apart(self, request_id: str, *, until: int) -> None:
        """It has steps of its own until so many tokens are computed."""
        self._apart_until[request_id] = until

    def forget(self, request_id: str) -> None:
        """It has ended."""
        self._apart_until.pop(request_id, None)
        self._num_suspected.pop(request_id, None)

    def choose(self, chunks: list[AnyChunk]) -> list[AnyChunk]:
        """Those of the planned chunks that run in this step; the others are planned again in the next."""
        if not self._apart_until:
            return chunks
        apart: list[AnyChunk] = []
        others: list[AnyChunk] = []
        for chunk in chunks:
            (apart if chunk.start < self._apart_until.get(chunk.id, 0) else others).append(chunk)
        if not apart:
            return chunks
        groups = [*([chunk] for chunk in apart), others] if others else [[chunk] for chunk in apart]
        self._num_choices += 1
        return groups[self._num_choices % len(groups)]

    def blame(self, planned: Sequence[SequencePlan], most_tokens: Callable[[str], int]) -> str | None:
        """Whose failure a step is that raised: its only request's. Else nobody's yet, and all of them run apart.

        `most_tokens` says how many tokens of a request can ever be computed.
        """
        assert planned
        if len(planned) == 1:
            self._num_suspected.clear()  # where a culprit is found, nobody else is suspected any longer
            return planned[0].request_id
        for sequence in planned:
            name = sequence.request_id
            self._num_suspected[name] += 1
            is_first = self._num_suspected[name] == 1
            self._apart_until[name] = sequence.start + len(sequence.token_ids) if is_first else most_tokens(name) + 1
        return None
