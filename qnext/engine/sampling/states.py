"""Constrained output: which tokens may come next, for one request, through llguidance.

A mask is a row of int32 words with one bit per row of the model's head, lowest bit first. It holds every token whose
bytes some complete output could continue with; end tokens exactly when the output could end here; nothing that is
padding. Control tokens and other added tokens are in it only where a Lark grammar names them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from qnext.engine.sampling.constraint import GrammarLimits
from qnext.engine.sampling.matchers import stop_reason
from qnext.engine.sampling.vocabulary import Mask, Vocabulary
from qnext.errors import ConstraintFailed


class Allowance:
    """Seconds of a thread's own time that an answer may spend: so many in a row, and so many more for each step."""

    def __init__(self, most: float, *, per_step: float) -> None:
        self._most = most
        self._per_step = per_step
        self._left = most

    @property
    def is_spent(self) -> bool:
        return self._left < 0

    def step(self) -> None:
        self._left = min(self._most, self._left + self._per_step)

    def spend(self, seconds: float) -> None:
        self._left -= seconds

    def copy(self) -> Allowance:
        other = Allowance(self._most, per_step=self._per_step)
        other._left = self._left
        return other


class CompiledGrammar:
    """A constraint that compiled, from which any number of requests start."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        limits: GrammarLimits,
        starts_after: tuple[int, ...] | None,
        opened_by: int | None = None,
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._limits = limits
        self._starts_after = starts_after
        self._opened_by = opened_by

    def new_state(self) -> GrammarState:
        return GrammarState(
            self._matcher, self._vocabulary, self._limits, self._starts_after or (), opened_by=self._opened_by
        )


class GrammarState:
    """How far the output of one request has come in its grammar. For one thread at a time.

    While the reasoning lasts (`is_asleep`) every token is allowed but the end tokens: an output that ended there
    would have dropped its constraint. After an end token only end tokens are allowed.

    Masks and accepted tokens have an allowance of time each, since they are computed between the steps of everybody's
    answers. That of tokens bounds what the matcher remembers of the answer as well: it writes less than 100 MB in a
    second. A matcher is made with the first mask, so that a request that waits holds none.
    """

    def __init__(
        self,
        template: llguidance.LLMatcher,
        vocabulary: Vocabulary,
        limits: GrammarLimits,
        starts_after: tuple[int, ...],
        *,
        opened_by: int | None = None,
    ) -> None:
        self._template = template
        self._own: llguidance.LLMatcher | None = None
        self._vocabulary = vocabulary
        self._limits = limits
        self._starts_after = starts_after
        self._tokens: list[int] = []
        self._opened_by = opened_by
        # Index of the first constrained token; None while the reasoning lasts.
        self._awake_from: int | None = None if starts_after and opened_by is None else 0
        self._ended_at: int | None = None  # index of the first end token
        self._mask: Mask | None = None  # of the present position
        self._for_masks = Allowance(limits.step_seconds, per_step=limits.mask_seconds)
        self._for_tokens = Allowance(limits.step_seconds, per_step=limits.token_seconds)

    @property
    def _matcher(self) -> llguidance.LLMatcher:
        if self._own is None:
            self._own = self._template.deep_copy()
        return self._own

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def is_asleep(self) -> bool:
        return self._awake_from is None

    @property
    def is_finished(self) -> bool:
        """An end token was accepted: the output is complete and satisfies the constraint."""
        return self._ended_at is not None

    def allowed(self) -> Mask:
        """The mask of the next token, read-only. Raises ConstraintFailed where nothing can follow, or too costly."""
        if self._mask is None:
            self._mask = self._computed_mask()
            self._mask.flags.writeable = False
        return self._mask

    def allows(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocabulary.size and bool(self.allowed()[token_id >> 5] >> (token_id & 31) & 1)

    def accept(self, token_id: int) -> None:
        """Advance by one token. Raises ConstraintFailed, and stays where it is, for one that is not allowed."""
        if not self.allows(token_id):
            raise ConstraintFailed(f"token {token_id} does not fit the output constraint")
        if not self._tokens and token_id == self._opened_by:
            self._awake_from = None
        elif not self.is_asleep and not self.is_finished:
            if token_id in self._vocabulary.eos_ids:
                self._ended_at = len(self._tokens)
            else:
                self._consume(token_id)
        self._tokens.append(token_id)
        self._mask = None
        count = len(self._starts_after)
        if self.is_asleep and tuple(self._tokens[-count:]) == self._starts_after:
            self._awake_from = len(self._tokens)

    def _consume(self, token_id: int) -> None:
        start = time.thread_time()
        is_consumed = self._matcher.consume_token(token_id)
        self._for_tokens.step()
        self._for_tokens.spend(time.thread_time() - start)
        if self._for_tokens.is_spent:
            reason = "its tokens take too long"
        elif is_consumed:
            return
        else:
            reason = stop_reason(self._matcher)
        self._restore(len(self._tokens))
        raise ConstraintFailed(f"the output constraint cannot be followed further: {reason}")

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens, as if they had never been accepted."""
        assert 0 <= num_tokens <= len(self._tokens)
        if num_tokens:
            self._restore(len(self._tokens) - num_tokens)

    def window(self, draft: Sequence[int]) -> NDArray[np.int32]:
        """Masks [n + 1, words] of the positions of a draft, of which the first n tokens are allowed; n may be 0.

        Row i is the mask after i tokens of the draft, the same as step by step; the state stays where it is.
        Raises ConstraintFailed where not even the first mask can be had.
        """
        masks = [self.allowed()]
        start = len(self._tokens)
        try:
            for token_id in draft:
                if not self.allows(token_id):
                    break
                self.accept(token_id)
                masks.append(self.allowed())
        except ConstraintFailed:
            pass  # a draft that leads where nothing can follow ends before; should it come true, the step will say so
        finally:
            self._restore(start)
            self._mask = masks[0]
        return np.stack(masks)

    def num_allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft are allowed, from the first on."""
        return len(self.window(draft)) - 1

    def copy(self) -> GrammarState:
        """The same state, from where both go their own ways."""
        other = GrammarState.__new__(GrammarState)
        other.__dict__.update(self.__dict__)
        other._own = None if self._own is None else self._own.deep_copy()
        other._tokens = list(self._tokens)
        other._for_masks, other._for_tokens = self._for_masks.copy(), self._for_tokens.copy()
        return other

    def _computed_mask(self) -> Mask:
        vocabulary = self._vocabulary
        if self.is_asleep:
            return vocabulary.text_mask.copy()
        if self.is_finished:
            return vocabulary.eos_mask.copy()
        start = time.thread_time()
        bits = self._matcher.compute_bitmask()  # a word too many where the vocabulary fills the last one
        words = np.frombuffer(bits, dtype=np.int32, count=vocabulary.num_words)
        if self._matcher.is_error():
            raise ConstraintFailed(f"the output constraint cannot be followed further: {stop_reason(self._matcher)}")
        self._for_masks.step()
        self._for_masks.spend(time.thread_time() - start)
        if self._for_masks.is_spent or self._for_tokens.is_spent:
            raise ConstraintFailed("the output constraint is too complex: its masks take too long")
        mask: Mask = words & vocabulary.text_mask
        if self._opened_by is not None and not self._tokens:
            mask[self._opened_by >> 5] |= np.array(1 << (self._opened_by & 31), dtype=np.uint32).view(np.int32)
        if self._matcher.is_accepting():
            mask |= vocabulary.eos_mask
        if not mask.any():
            raise ConstraintFailed("the output constraint cannot be followed further: no token fits")
        return mask

    def _num_consumed(self, num_tokens: int) -> int:
        """How many of the first tokens the matcher has seen: none of the reasoning, no end token."""
        if self._awake_from is None:
            return 0
        end = num_tokens if self._ended_at is None else min(num_tokens, self._ended_at)
        return max(0, end - self._awake_from)

    def _restore(self, num_tokens: int) -> None:
        """Be where the first `num_tokens` led; a matcher in error is made anew."""
        behind = self._num_consumed(len(self._tokens)) - self._num_consumed(num_tokens)
        if self._own is not None and (self._own.is_error() or (behind and not self._own.rollback(behind))):
            start = time.thread_time()
            self._own = self._template.deep_copy()
            first = self._awake_from or 0
            self._own.consume_tokens(self._tokens[first : first + self._num_consumed(num_tokens)])
            self._for_tokens.spend(time.thread_time() - start)
        del self._tokens[num_tokens:]
        self._mask = None
        if self._ended_at is not None and self._ended_at >= num_tokens:
            self._ended_at = None
        if self._opened_by is not None and not num_tokens:
            self._awake_from = 0
        elif self._starts_after and self._awake_from is not None and self._awake_from > num_tokens:
            self._awake_from = None
