"""What crosses between policy and tensors: the plan of a step goes down, its result comes back. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qnext.engine.request import FinishReason, Request, SampledToken
from qnext.engine.scheduling.archive import Load
from qnext.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Sizes that bound a scheduler.

    A prompt chunk that is not the prompt's last ends at a multiple of `chunk_size` tokens, and so does a cached prefix:
    the grid on which the delta rule works, 1 where any cut gives the same bits. `num_blocks` is None for a model
    without full attention, which needs no blocks. `num_slots` holds the states of running requests and, beyond them,
    those of cached prefixes, made while a prompt is read every `checkpoint_interval` tokens (0: only where they are
    likely to be of use) and at least `min_prefix_tokens` apart.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int | None
    num_slots: int
    chunk_size: int
    has_states: bool = True
    has_prefix_cache: bool = False
    checkpoint_interval: int = 0
    min_prefix_tokens: int = 64
    max_draft_tokens: int = 0  # of a sequence in a step

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise UsageError(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        check_step_size(self.max_num_batched_tokens, max_num_seqs=self.max_num_seqs, chunk_size=self.chunk_size)

    def blocks_of(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return 0 if self.num_blocks is None else -(-num_tokens // self.block_size)


def check_step_size(max_num_batched_tokens: int, *, max_num_seqs: int, chunk_size: int) -> None:
    """Raises UsageError where a step has no room for a piece of a prompt beside running requests."""
    least = max_num_seqs - 1 + chunk_size
    if max_num_batched_tokens < least:
        raise UsageError(
            f"max_num_batched_tokens must be at least max_num_seqs - 1 + {chunk_size} = {least}, "
            f"not {max_num_batched_tokens}: a prompt would starve beside running requests"
        )


class SequencePlan(NamedTuple):
    """The tokens of one request in a step, drafted ones last: positions `start` to `start + len(token_ids)`."""

    request: Request
    token_ids: tuple[int, ...]
    start: int
    needs_sample: bool  # the last token that is not drafted is the last known one: its logits choose the next
    drafts: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: Request, end: int, drafts: tuple[int, ...]) -> SequencePlan:
        """What is known up to token `end` and is not computed, and `drafts` behind it."""
        start = request.num_computed_tokens
        known = request.token_range(start, end)
        return cls(request, known + drafts, start, end == request.num_tokens, drafts)


class StepPlan(NamedTuple):
    """Work for one step. First what was freed is forgotten, then prefixes are loaded, then copies are made in their
    order, then tokens run."""

    sequences: tuple[SequencePlan, ...]
    freed_blocks: tuple[int, ...]  # given back since the last step; nothing of them may be read again
    freed_slots: tuple[int, ...]
    block_copies: tuple[tuple[int, int], ...] = ()  # (from, to)
    slot_copies: tuple[tuple[int, int], ...] = ()
    loads: tuple[Load, ...] = ()

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence goes on from its last token."""
        return all(len(s.token_ids) == 1 + len(s.drafts) and s.start > 0 and s.needs_sample for s in self.sequences)


class StepResult(NamedTuple):
    """The chosen tokens of every sequence of the plan that needed one, by request id: one, and one more for each draft
    that was right."""

    tokens: Mapping[str, Sequence[SampledToken]]


class TokenEvent(NamedTuple):
    """A request got a token. With finish_reason "stop" the token is the stop token itself."""

    request_id: str
    token: SampledToken
    finish_reason: FinishReason | None


class EndEvent(NamedTuple):
    """A request ended without another token: by "error", see its `failure`, or by "deadline"."""

    request_id: str
    finish_reason: FinishReason
