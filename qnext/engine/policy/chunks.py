"""Tokens of one sequence that are to run in a step, and how a plan says that. No torch."""

from __future__ import annotations

from typing import NamedTuple

from qnext.engine.policy.request import Request
from qnext.engine.policy.sequence import Sequence
from qnext.engine.policy.step import PromptScores, SequencePlan


class Chunk(NamedTuple):
    """What is known of a sequence up to token `end` and is not computed, and `drafts` behind it."""

    sequence: Sequence
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return self.sequence.id

    @property
    def start(self) -> int:
        return self.sequence.num_computed_tokens

    def plan(self) -> SequencePlan:
        """As data. From now on the cache's table has all blocks of the sequence."""
        sequence, end, drafts = self
        request, start = sequence.request, sequence.num_computed_tokens
        known, sequence.num_planned_blocks = sequence.num_planned_blocks, len(sequence.blocks)
        assert sequence.slot is not None
        return SequencePlan(
            request.id,
            sequence.slot,
            request.token_range(start, end) + drafts,
            start,
            needs_sample=end == request.num_tokens,
            num_drafts=len(drafts),
            num_prompt=len(request.prompt_ids),
            first_block=known,
            blocks=tuple(sequence.blocks[known:]),
            adapter=request.adapter,
            scores=None if request.params.prompt_logprobs is None else _scores_of(request, start, end),
        )


def _scores_of(request: Request, start: int, end: int) -> PromptScores | None:
    """What the rows of tokens `start` to `end` add to `request.prompt_sampled`; nothing is there twice."""
    prompt, num_top = request.prompt_ids, request.params.prompt_logprobs
    assert num_top is not None
    if start >= len(prompt):
        return None
    first = max(len(request.prompt_sampled), start + 1)  # row t tells of token start + t + 1
    assert first <= max(len(request.prompt_sampled), 1), "rows of the prompt were left out"
    return PromptScores(first - start - 1, prompt[first : min(end + 1, len(prompt))], num_top)
