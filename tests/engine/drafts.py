"""Drafts that a test gives, in the place of an engine's drafter."""

from __future__ import annotations

from collections.abc import Iterable

from qnext.engine.policy.planner import Drafts
from qnext.engine.policy.sequence import Sequence
from qnext.engine.sampling.sampler import Verdict, Window


class GivenDrafts(dict[str, tuple[int, ...]]):
    """By request id; each is drafted once."""

    def draft(self, sequences: Iterable[Sequence]) -> Drafts:
        return {sequence.id: self.pop(sequence.id, ()) for sequence in sequences}

    def learn(self, windows: list[Window], verdicts: list[Verdict], *, seconds: float | None) -> None: ...
