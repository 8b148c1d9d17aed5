"""What runs in a step: how its budget of tokens is spent. Integers only, no torch.

Every running request that is past its prompt goes on in every step, and what is left of the step's token budget reads
prompts in chunks, in fair shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TypeAlias

from qnext.engine.policy.admission import Admission
from qnext.engine.policy.chunks import Chunk
from qnext.engine.policy.resources import Resources
from qnext.engine.policy.seats import Seats
from qnext.engine.policy.sequence import Sequence, Status

Drafts: TypeAlias = Mapping[str, tuple[int, ...]]


class Planner:
    """Makes one plan after another."""

    def __init__(self, resources: Resources, seats: Seats) -> None:
        self._resources = resources
        self._limits, self._blocks, _, self._turns, self._running, self._shares, self._sharing = resources
        self._seats = seats
        self._admission = Admission(resources)
        self._chunks: list[Chunk] = []  # of the plan that is made
        self._planned: set[Sequence] = set()  # those that have their place in it

    def decoding(self) -> list[Sequence]:
        """Sequences that have read their prompts and go on from their last token, in the order of their admission."""
        return [s for s in self._running if s.num_unread == 1]

    def plan(self, drafts: Drafts) -> list[Chunk]:
        """The chunks of the next step, as far as room and budget go."""
        self._chunks, self._planned = [], set()
        # Where an owner waits that has less than its share, the newest request of one that has more goes back.
        victim = self._admission.who_yields()
        if victim is not None:
            self._seats.preempt(victim)
        num_preemptions = self._seats.num_preemptions
        budget = self._decode(self._limits.max_num_batched_tokens, drafts)
        self._prompts(budget, may_admit=num_preemptions == self._seats.num_preemptions)
        return self._chunks

    # ---- parts of a step; each returns what is left of the budget ----

    def _decode(self, budget: int, drafted: Drafts) -> int:
        """The last token of every request that has read its prompt, and what was drafted to follow it."""
        decoding = self.decoding()
        if len(self._blocks.holdings.held) > 1:  # who holds too much comes last, for it may have to make room
            decoding.sort(key=lambda sequence: self._blocks.holdings.excess(sequence.owner) > 0)
        for n, sequence in enumerate(decoding):
            if sequence.status is not Status.RUNNING:
                continue  # it had to make room for an older one
            num_tokens, drafts = sequence.num_tokens, drafted.get(sequence.id, ())
            if drafts:
                drafts = self._affordable(sequence, drafts, spare=budget - (len(decoding) - n))
            if sequence.flight is not None:
                sequence.flight.num_planned = num_tokens  # the last token of a prompt
            if self._seats.grow(sequence, num_tokens + len(drafts), self._planned):
                self._put(Chunk(sequence, num_tokens, drafts))
                budget -= 1 + len(drafts)
        return budget

    def _affordable(self, sequence: Sequence, drafts: tuple[int, ...], *, spare: int) -> tuple[int, ...]:
        """As many of the drafts as the budget and the answer have room for, none where that takes blocks of others."""
        most = min(self._limits.max_draft_tokens, spare, sequence.max_cached_tokens - sequence.num_tokens)
        drafts = drafts[: max(0, most)]
        missing = self._resources.num_missing(sequence, sequence.num_tokens + len(drafts))
        has_room = not drafts or self._shares.make_room(missing, 0, sequence.owner, reach="share")
        return drafts if has_room else ()

    def _prompts(self, budget: int, *, may_admit: bool) -> None:
        """Chunks of prompts: an equal part of the budget for each owner, and one for requests from the queue. What one
        does not need is the others'."""
        reading: dict[str, list[Sequence]] = {}
        if len(self._planned) < len(self._running):
            for sequence in self._running:
                if sequence.num_unread > 1:
                    reading.setdefault(sequence.owner, []).append(sequence)
        first = self._admission.first() if may_admit else None
        if len(reading) + (first is not None and first.owner not in reading) < 2:
            (own,) = reading.values() or ([],)
            self._reading(own, budget, admits=first is not None)
            return
        unread = {owner: sum(s.num_unread for s in own) for owner, own in reading.items()}
        owners: list[str | None] = [*sorted(unread, key=unread.__getitem__)]
        if first is not None and first.owner not in reading:
            owners.insert(-1, None)  # for the queue; who has most to read has what the others leave
        if budget < len(owners) * self._limits.chunk_size:  # not all get a chunk in this step: who had none for longest
            owners.sort(
                key=lambda owner: self._turns.last_read(first.owner if owner is None and first else owner or "")
            )
        for num_left, owner in zip(range(len(owners), 0, -1), owners, strict=True):
            part = budget if num_left == 1 else min(budget, max(budget // num_left, self._limits.chunk_size))
            if owner is None:
                budget += self._admissions(part) - part
            else:
                admits = first is not None and first.owner == owner
                budget += self._reading(reading[owner], part, admits=admits) - part

    def _reading(self, reading: list[Sequence], budget: int, *, admits: bool) -> int:
        """Prompts of one owner. The oldest has half of the budget, so that it comes to an end; of the others the
        shortest go first, and half of what they could take is for new ones. What nobody needs is the oldest's."""
        reserve = 0
        if reading and (admits or len(reading) > 1):
            reserve = max(budget // 2, min(budget, self._limits.chunk_size))
        rest = budget - reserve
        for sequence in sorted(reading[1:], key=lambda s: s.num_unread):
            rest -= self._read(sequence, rest // 2 if admits else rest)
        if admits:
            rest = self._admissions(rest)
        if reading:
            rest -= self._read(reading[0], reserve + rest) - reserve
        return rest

    def _admissions(self, budget: int) -> int:
        """Requests from the queue, in turn; those that wait for another's prefix let others pass."""
        passed: list[Sequence] = []
        while (sequence := self._admission.first()) is not None:
            if self._chunk_end(sequence, 0, budget) == 0:
                break
            if self._admission.must_wait(sequence):
                self._turns.remove(sequence)
                passed.append(sequence)
                continue
            if not self._admission.admit(sequence):
                continue
            for other in islice(self._turns.waiting_of(sequence.owner), self._limits.max_num_seqs):
                # Before the chunk is planned: it should end where another's prompt parts.
                self._sharing.must_wait(other, sequence.flight)
            budget -= self._read(sequence, budget)
        for sequence in reversed(passed):
            self._turns.put_back(sequence)
        return budget

    def _read(self, sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed_tokens
        end = self._chunk_end(sequence, start, budget)
        if not end:
            return 0
        if sequence.flight is not None:
            sequence.flight.num_planned = end
        self._put(Chunk(sequence, end))
        self._turns.note_read(sequence.owner)
        return end - start

    def _put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._planned.add(chunk.sequence)

    def _chunk_end(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where the next chunk of the prompt ends; 0 when the budget is too small for one."""
        end = min(sequence.num_tokens, start + budget)
        if end < sequence.num_tokens:
            end -= end % self._limits.chunk_size
        if sequence.flight is not None and sequence.flight.next_stop is not None:
            end = min(end, sequence.flight.next_stop)
        return end if end > start else 0
