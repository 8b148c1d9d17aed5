"""Whether an output may end, as the masks of its grammar say."""

from __future__ import annotations

from qnext.engine.sampling.grammar import GrammarState
from qnext.errors import ConstraintFailed


def can_end(state: GrammarState) -> bool:
    """The output so far satisfies the constraint."""
    try:
        return any(map(state.allows, state._vocabulary.eos_ids))
    except ConstraintFailed:
        return False


def must_end(state: GrammarState) -> bool:
    """Nothing but an end token can follow."""
    return can_end(state) and not (state.allowed() & ~state._vocabulary.eos_mask).any()
