"""How far one request has come: reasoning before its constraint, drafts taken back, copies, and failures of its own."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qnext.engine.sampling.constraint import Constraint, GrammarLimits
from qnext.engine.sampling.grammar import GrammarCompiler
from qnext.errors import ConstraintFailed, QnextError
from tests.engine.grammar_ends import can_end, must_end
from tests.engine.grammars import CONSTRAINTS, compiler, encoded, follow, hybrid, ids_of, state_of, tokenizer


def test_reasoning_is_free_and_what_follows_is_not() -> None:
    end_of_thought = tokenizer("bpe").token_id("</think>")
    state = state_of(Constraint("choice", ("yes", "no"), starts_after=(end_of_thought,)))
    eos = sorted(compiler().vocabulary.eos_ids)
    for token in encoded('Hmm, {"maybe"'):
        assert state.is_asleep
        assert not can_end(state)
        assert not set(eos) & set(ids_of(state.allowed()))  # ending here would drop the constraint
        state.accept(token)
    state.accept(end_of_thought)
    assert not state.is_asleep
    assert np.array_equal(state.allowed(), state_of(Constraint("choice", ("yes", "no"))).allowed())
    follow(state, "no")
    assert must_end(state)
    state.rollback(len(encoded("no")) + 1)
    assert state.is_asleep
    state.accept(end_of_thought)
    assert np.array_equal(state.allowed(), state_of(Constraint("choice", ("yes", "no"))).allowed())


def test_reasoning_may_end_with_several_tokens() -> None:
    marks = encoded("x") + encoded("y") + encoded("x") + encoded("z")
    state = state_of(Constraint("regex", "[0-9]", starts_after=tuple(marks)))
    stream = marks[:3] + marks[1:]  # x y x y x z: the sequence starts inside of a false start
    for index, token in enumerate(stream):
        assert state.is_asleep, index
        state.accept(token)
    assert not state.is_asleep
    with pytest.raises(ConstraintFailed):
        state.accept(marks[0])


def test_an_output_may_open_its_reasoning_itself() -> None:
    start, end = (tokenizer("bpe").token_id(name) for name in ("<think>", "</think>"))
    state, bare = state_of(hybrid("choice", ("yes", "no"))), state_of(Constraint("choice", ("yes", "no")))
    assert set(ids_of(state.allowed())) == {*ids_of(bare.allowed()), start}
    assert not state.is_asleep
    assert (
        len(state.window([start, *encoded("hm"), end, *encoded("no")]))
        == 4 + len(encoded("no")) + len(encoded("hm")) - 1
    )
    state.accept(start)
    assert state.is_asleep and not can_end(state)
    for token in encoded("hm, no"):
        state.accept(token)
    state.accept(end)
    assert np.array_equal(state.allowed(), bare.allowed()), "a second thought is none"
    follow(state, "yes")
    state.rollback(state.num_tokens - 2)
    assert state.is_asleep
    state.rollback(2)
    follow(state, "no")
    assert can_end(state) and must_end(state)


@pytest.mark.parametrize(
    "constraint",
    [
        hybrid("choice", ("<think>\nhm\n</think>\n\nok", "<think>")),
        hybrid("regex", "<think>.*"),
        hybrid("regex", "(?s:.*)"),
        hybrid("lark", 'start: <think> "a" </think> "b"'),
        hybrid("lark", 'start: "<think>" /[a-z]+/'),
    ],
)
def test_a_constraint_that_describes_the_reasoning_holds_from_the_beginning(constraint: Constraint) -> None:
    state = state_of(constraint)
    plain = state_of(Constraint(constraint.kind, constraint.value))
    assert np.array_equal(state.allowed(), plain.allowed())
    token = ids_of(state.allowed())[0]
    state.accept(token)
    assert not state.is_asleep


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
def test_rollback_is_as_if_never_accepted(constraint: Constraint) -> None:
    draw = random.Random(5)
    state = state_of(constraint)
    past: list[tuple[np.ndarray, bool]] = []
    for _ in range(150):
        ids = ids_of(state.allowed())
        past.append((state.allowed().copy(), state.is_asleep))
        state.accept(70 if 70 in ids and draw.random() < 0.1 else draw.choice(ids))
        if draw.random() < 0.3:
            count = draw.randint(1, min(6, state.num_tokens))
            state.rollback(count)
            del past[state.num_tokens + 1 :]
            mask, is_asleep = past.pop()
            assert np.array_equal(state.allowed(), mask)
            assert state.is_asleep == is_asleep
    assert len(past) == state.num_tokens
    state.rollback(state.num_tokens)
    assert np.array_equal(state.allowed(), state_of(constraint).allowed())


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
def test_a_window_is_the_same_step_by_step(constraint: Constraint) -> None:
    """Good drafts, drafts that go wrong somewhere, drafts across the end and across the end of the reasoning."""
    size = compiler().vocabulary.size
    for seed in range(25):
        draw = random.Random(seed)
        state, twin = state_of(constraint), state_of(constraint)
        for _ in range(8):
            before = state.num_tokens
            reference, draft, masks = twin.copy(), [], [twin.allowed().copy()]
            is_right = True
            for _ in range(5):
                ids = ids_of(reference.allowed())
                is_right = is_right and draw.random() < 0.85
                token = (
                    (70 if 70 in ids and draw.random() < 0.2 else draw.choice(ids))
                    if is_right
                    else draw.randrange(size)
                )
                draft.append(token)
                if token not in ids:
                    is_right = False
                    draft += [draw.randrange(size) for _ in range(4 - len(draft))]
                    break
                reference.accept(token)
                masks.append(reference.allowed().copy())
            window = state.window(draft)
            assert np.array_equal(window, np.stack(masks))
            assert state.num_allowed(draft) == len(masks) - 1
            assert state.num_tokens == before
            assert np.array_equal(state.allowed(), twin.allowed())
            kept = draft[: draw.randint(0, len(masks) - 1)] or [draw.choice(ids_of(state.allowed()))]
            for token in kept:
                state.accept(token)
                twin.accept(token)


def test_copies_go_their_own_ways() -> None:
    state = follow(state_of(Constraint("choice", ("yes", "yea", "no"))), "y")
    other = state.copy()
    follow(state, "es")
    assert must_end(state)
    assert not can_end(other)
    assert must_end(follow(other, "ea"))


def test_a_dead_end_fails_one_request_alone() -> None:
    """An end token inside of a grammar cannot be followed: an end is an end."""
    compiled = compiler().compile(Constraint("lark", 'start: "ab" <|im_end|> "c"'))
    state, other = compiled.new_state(), compiled.new_state()
    first = encoded("a")[0]
    state.accept(first)
    dead = encoded("b")[0]
    assert state.window([dead, 7]).shape[0] == 1  # the draft ends before the dead end
    state.accept(dead)
    with pytest.raises(ConstraintFailed, match="no token fits"):
        state.allowed()
    state.rollback(1)
    assert ids_of(state.allowed()) == [dead]
    assert np.array_equal(follow(other, "a").allowed(), state.allowed())


def test_a_spent_budget_is_an_error_of_the_request() -> None:
    limits = GrammarLimits(step_lexer_fuel=300, initial_lexer_fuel=10**6)
    tight = GrammarCompiler(compiler().vocabulary, limits)
    with pytest.raises(QnextError):
        state = tight.compile(Constraint("regex", "(((a{1,9}b?){1,9}c?){1,9}.{1,9}[a-z]*){1,99}")).new_state()
        for token in encoded("aabcaacxyzabcabcaabbcc" * 9):
            state.allowed()
            state.accept(token)
    assert ids_of(tight.compile(Constraint("choice", ("a",))).new_state().allowed()) == encoded("a")
