"""What policy and tensors say to each other, as data: plans go down, chosen tokens come back. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qnext.engine.policy.archive import Load
from qnext.engine.policy.prefix_node import Spill
from qnext.engine.policy.request import FinishReason, SampledToken
from qnext.errors import UsageError


@dataclass(frozen=True)
class EngineLimits:
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


class Rows(NamedTuple):
    """Consecutive tokens of one sequence, from position `start` on. For the MTP layer the sequence begins at `base`."""

    slot: int
    token_ids: tuple[int, ...]
    start: int
    is_draft: bool = False
    num_prompt: int = 0
    base: int = 0


class PromptScores(NamedTuple):
    """Tokens of a prompt whose log-probabilities are asked for, and that a chunk's rows tell: from row `first_row` on
    one for each of `targets`."""

    first_row: int
    targets: tuple[int, ...]
    num_top: int  # most likely ones beside each


class SequencePlan(NamedTuple):
    """The tokens of one request in a step, drafted ones last: positions `start` to `start + len(token_ids)`."""

    request_id: str
    slot: int
    token_ids: tuple[int, ...]
    start: int
    needs_sample: bool  # the last token that is not drafted is the last known one: its logits choose the next
    num_drafts: int = 0
    num_prompt: int = 0  # tokens of the request's prompt
    first_block: int = 0  # of the sequence, counted from its start, that no earlier plan has named
    blocks: tuple[int, ...] = ()  # these and the ones behind it
    scores: PromptScores | None = None
    adapter: int = 0  # number of the adapter that its rows go through; 0: none

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :] if self.num_drafts else ()

    @property
    def decodes(self) -> bool:
        """Whether it goes on from its last token."""
        return len(self.token_ids) == 1 + self.num_drafts and self.start > 0 and self.needs_sample


class StepPlan(NamedTuple):
    """Work for one step, in this order: accepted drafts become a part of their sequences, spills are saved, what was
    freed is forgotten, prefixes are loaded, copies are made one after another, tokens run.

    All of it is data: another process can run it. Every plan is to be run, in the order in which they were made, and a
    step that raises has applied `accepted`.
    """

    sequences: tuple[SequencePlan, ...] = ()
    freed_blocks: tuple[int, ...] = ()  # given back since the last step; nothing of them may be read again
    freed_slots: tuple[int, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()  # (from, to)
    slot_copies: tuple[tuple[int, int], ...] = ()
    loads: tuple[Load, ...] = ()
    accepted: tuple[tuple[int, int], ...] = ()  # (slot, tokens of its last step that belong to its sequence)
    spills: tuple[Spill, ...] = ()  # prefixes that are to be kept elsewhere

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence goes on from its last token."""
        return all(s.decodes for s in self.sequences)


class DraftPlan(NamedTuple):
    """A pass of the MTP layer over rows of some sequences.

    "chain" drafts `depth` tokens one after another, the most likely ones; "next" gives logits of the last row of each
    sequence; "known" those of the last rows of one sequence that lead to tokens which are known, and is rare unless it
    `recurs`.
    """

    kind: Literal["chain", "next", "known"]
    rows: tuple[Rows, ...]
    depth: int = 1
    recurs: bool = True
    goes_on: bool = False  # after another pass, with nothing between them


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
