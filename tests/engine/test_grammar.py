"""Constrained output against what the constraint says: other libraries judge the texts, brute force the masks."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from qnext.engine.sampling import matchers as matchers_module
from qnext.engine.sampling.constraint import Constraint, GrammarLimits, grammar_text
from qnext.engine.sampling.grammar import GrammarCompiler, Vocabulary
from qnext.errors import ConstraintFailed, UsageError
from tests.engine.grammar_ends import can_end, must_end
from tests.engine.grammars import (
    CHOICES,
    CONSTRAINTS,
    LARK,
    PATTERNS,
    SCHEMAS,
    compiler,
    encoded,
    follow,
    ids_of,
    sampled,
    sampled_or_cut,
    state_of,
    text_of,
    tokenizer,
)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_sample_satisfies_its_schema(name: str, kind: str) -> None:
    texts = set()
    for seed in range(12):
        text = text_of(sampled(state_of(Constraint("json_schema", SCHEMAS[name]), kind), seed=seed), kind)
        jsonschema.validate(json.loads(text), SCHEMAS[name])
        texts.add(text)
    assert len(texts) > 1


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_json_object_samples_are_objects(kind: str) -> None:
    num_complete = 0
    for seed in range(8):
        try:
            tokens = sampled(state_of(Constraint("json_object"), kind), seed=seed, end=1.0, max_tokens=1000)
        except TimeoutError:
            continue  # a random object may nest without end
        assert isinstance(json.loads(text_of(tokens, kind)), dict)
        num_complete += 1
    assert num_complete > 2
    assert can_end(follow(state_of(Constraint("json_object"), kind), '{"a": [1, {"b": null}]}', kind))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_samples_match_the_whole_expression(pattern: str, kind: str) -> None:
    for seed in range(12):
        text = text_of(sampled(state_of(Constraint("regex", pattern), kind), seed=seed), kind)
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_choice_and_nothing_else(kind: str) -> None:
    constraint = Constraint("choice", CHOICES)
    for choice in CHOICES:
        assert can_end(follow(state_of(constraint, kind), choice, kind))
    found = {text_of(sampled(state_of(constraint, kind), seed=seed, end=0.5), kind) for seed in range(150)}
    assert found <= set(CHOICES)
    assert len(found) > 5


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_lark_samples_are_sentences(kind: str) -> None:
    for seed in range(20):
        text = text_of(sampled(state_of(Constraint("lark", LARK), kind), seed=seed, end=0.7), kind)
        assert re.fullmatch(r"[0-9()+-]+", text)
        assert text.count("(") == text.count(")")
        assert isinstance(eval_sum(text), int)


def eval_sum(text: str) -> int:
    """Sum with brackets, by hand: Python refuses numbers with leading zeros."""
    while "(" in text:
        text = re.sub(r"\(([^()]*)\)", lambda match: str(abs(eval_sum(match[1]))), text)
    parts = re.fullmatch(r"[0-9]+([+-][0-9]+)*", text)
    assert parts, text
    return sum(int(part) for part in re.findall(r"[+-]?[0-9]+", text))


def test_a_mask_is_exactly_what_some_answer_continues() -> None:
    """Brute force over the vocabulary: bytes that are a prefix of an answer, split characters included."""
    answers = [text.encode() for text in ("né🙂", "née", "no", "你好", "你")]
    constraint = Constraint("choice", tuple(text.decode() for text in answers))
    table = compiler().vocabulary.token_bytes
    special = compiler().vocabulary.special_ids
    for answer in answers:
        for cut in range(len(answer) + 1):
            state = state_of(constraint)
            for byte in answer[:cut]:
                state.accept(table.index(bytes([byte])))
            done = answer[:cut]
            expected = [
                i
                for i, text in enumerate(table)
                if (i in compiler().vocabulary.eos_ids and done in answers)
                or (i not in special and text and any(whole.startswith(done + text) for whole in answers))
            ]
            assert ids_of(state.allowed()) == expected


def test_end_tokens_exactly_where_the_grammar_accepts() -> None:
    state = state_of(Constraint("regex", "ab*"))
    ends = sorted(compiler().vocabulary.eos_ids)
    assert not can_end(state)
    assert not set(ends) & set(ids_of(state.allowed()))
    follow(state, "a")
    assert can_end(state)
    assert not must_end(state)
    assert set(ends) < set(ids_of(state.allowed()))
    for token in (*ends, *ends):
        state.accept(token)
        assert state.is_finished
        assert must_end(state)
        assert ids_of(state.allowed()) == ends
    with pytest.raises(ConstraintFailed):
        state.accept(encoded("b")[0])
    state.rollback(4)
    assert not state.is_finished
    assert state.allows(encoded("b")[0])


def test_what_is_complete_must_end() -> None:
    state = follow(state_of(Constraint("choice", ("yes", "no"))), "yes")
    assert must_end(state)
    assert ids_of(state.allowed()) == sorted(compiler().vocabulary.eos_ids)


def test_special_tokens_only_where_a_grammar_names_them() -> None:
    tool_call = tokenizer("bpe").token_id("<tool_call>")
    specials = compiler().vocabulary.special_ids - compiler().vocabulary.eos_ids
    wide = state_of(Constraint("regex", r"(?s:.*)"))
    assert not specials & set(ids_of(wide.allowed()))
    assert can_end(follow(wide, "<tool_call>"))  # spelled out it is text
    named = state_of(Constraint("lark", 'start: <tool_call> "x"'))
    assert ids_of(named.allowed()) == [tool_call]
    named.accept(tool_call)
    assert must_end(follow(named, "x"))


def test_padding_is_never_allowed() -> None:
    size, real = compiler().vocabulary.size, tokenizer("bpe").vocab_size
    for constraint in (
        Constraint("lark", "start: <[*]>"),
        Constraint("regex", r"(?s:.*)"),
        Constraint("regex", "a", (5,)),
    ):
        mask = state_of(constraint).allowed()
        assert len(mask) == (size + 31) // 32
        assert ids_of(mask)
        assert max(ids_of(mask)) < real
    with pytest.raises(ConstraintFailed):
        state_of(Constraint("regex", "a*")).accept(real)
    for token in (-1, size, 10**9):
        with pytest.raises(ConstraintFailed):
            state_of(Constraint("regex", "a*")).accept(token)


def test_a_vocabulary_is_checked() -> None:
    with pytest.raises(UsageError, match="end token"):
        Vocabulary([b"a"], eos_ids=())
    with pytest.raises(UsageError, match="below the vocabulary size"):
        Vocabulary([b"a"], eos_ids=(1,))
    above = Vocabulary([b"a", b"b"], eos_ids=(40,), size=41)  # an end token among the rows above the tokenizer's
    state = GrammarCompiler(above).compile(Constraint("regex", "a?")).new_state()
    assert ids_of(state.allowed()) == [0, 40]
    state.accept(0)
    assert ids_of(state.allowed()) == [40]


def test_grammar_texts_differ_where_constraints_do() -> None:
    limits = GrammarLimits()
    ordered = grammar_text(Constraint("json_schema", '{"properties": {"a": {}, "b": {}}}'), limits)
    assert ordered != grammar_text(Constraint("json_schema", '{"properties": {"b": {}, "a": {}}}'), limits)
    assert grammar_text(Constraint("regex", "^a$"), limits) == grammar_text(Constraint("regex", "a"), limits)
    assert grammar_text(Constraint("regex", r"a\$"), limits) != grammar_text(Constraint("regex", "a"), limits)


def test_the_library_calls_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks must not depend on how forced bytes would be tokenized, so the library must not ask."""
    asked: list[object] = []
    monkeypatch.setattr(matchers_module._GuidanceTokenizer, "__call__", lambda self, text: asked.append(text) or [])
    for constraint in CONSTRAINTS:
        sampled_or_cut(state_of(constraint))
    assert not asked


@pytest.mark.parametrize("size", [95, 96, 97, 128])
def test_masks_have_a_word_for_32_tokens(size: int) -> None:
    """Also where the vocabulary fills the last word exactly."""
    vocabulary = Vocabulary([bytes([32 + i]) for i in range(94)], eos_ids=(94,), size=size)
    state = GrammarCompiler(vocabulary).compile(Constraint("regex", r"[ -}]*")).new_state()
    assert len(state.allowed()) == (size + 31) // 32
    assert ids_of(state.allowed()) == list(range(95))
