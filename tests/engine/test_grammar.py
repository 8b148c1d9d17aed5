"""Constrained output against what the constraint says: other libraries judge the texts, brute force the masks."""

from __future__ import annotations

import json
import math
import random
import re
import time
from functools import cache

import jsonschema
import numpy as np
import pytest
import torch

from qnext.engine.sampling import matchers as matchers_module
from qnext.engine.sampling.constraint import Constraint, GrammarLimits, grammar_text
from qnext.engine.sampling.grammar import GrammarCompiler, GrammarState, Vocabulary, apply_masks
from qnext.errors import ConstraintFailed, QnextError, UsageError
from qnext.text.tokenizer import Tokenizer
from qnext.text.train import byte_level_tokenizer, train_bpe

CORPUS = [
    "The quick brown fox jumps over the lazy dog; 3.14159 and 2024-11-21, yes or no.\n" * 8,
    '{"name": "Zoë", "tags": ["a", "b"], "age": 31, "ok": true, "none": null}\n' * 8,
    "你好，世界。 Ünïcödé naïve café 🙂🚀 \t\t x² ≠ y³\n" * 8,
]
PADDING = 13  # rows of a model's head above the tokenizer's last id


@cache
def tokenizer(kind: str) -> Tokenizer:
    backend = byte_level_tokenizer() if kind == "bytes" else train_bpe(CORPUS, vocab_size=600)
    return Tokenizer(backend, eos_tokens=["<|im_end|>", "<|endoftext|>"])


@cache
def compiler(kind: str = "bpe") -> GrammarCompiler:
    made = tokenizer(kind)
    return GrammarCompiler(
        Vocabulary(
            made.token_table(),
            eos_ids=made.eos_ids,
            special_ids=made.added_ids.values(),
            size=made.vocab_size + PADDING,
        )
    )


def state_of(constraint: Constraint, kind: str = "bpe") -> GrammarState:
    return compiler(kind).compile(constraint).new_state()


def ids_of(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def sampled(state: GrammarState, *, seed: int, end: float = 0.3, max_tokens: int = 4000) -> list[int]:
    """Random allowed tokens without the end token, ending where that is possible with probability `end`.

    Raises TimeoutError when no end comes.
    """
    draw = random.Random(seed)
    vocabulary = state._vocabulary
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        ids = ids_of(state.allowed())
        ends = [token for token in ids if token in vocabulary.eos_ids]
        rest = [token for token in ids if token not in ends]
        assert bool(ends) == state.can_end or state.is_asleep
        if ends and (not rest or draw.random() < end):
            state.accept(draw.choice(ends))
            assert state.is_finished
            return tokens
        closing = [token for token in rest if vocabulary.token_bytes[token] in (b"}", b"]", b'"')]
        tokens.append(draw.choice(closing if closing and draw.random() < 0.4 else rest))
        state.accept(tokens[-1])
    raise TimeoutError


def text_of(tokens: list[int], kind: str = "bpe") -> str:
    return b"".join(tokenizer(kind).token_bytes(token) for token in tokens).decode("utf-8")  # strict


def encoded(text: str, kind: str = "bpe") -> list[int]:
    return tokenizer(kind).encode(text)


def follow(state: GrammarState, text: str, kind: str = "bpe") -> GrammarState:
    for token in encoded(text, kind):
        state.accept(token)
    return state


def closed(**properties: object) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "person": closed(
        name={"type": "string", "maxLength": 8},
        age={"type": "integer", "minimum": 0, "maximum": 150},
        tags={"type": "array", "items": {"enum": ["red", "grün", "青", "🙂"]}, "minItems": 1, "maxItems": 3},
    ),
    "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}, closed(x={"type": "number", "maximum": 10})]},
    "pattern": closed(code={"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]+$", "maxLength": 12}),
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 3}, {"const": 7}],
        "items": False,
        "minItems": 2,
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": closed(
                v={"type": "integer", "minimum": 0, "maximum": 9},
                c={"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/node"}},
            )
        },
    },
    "unicode": closed(**{"schlüssel 🙂": {"enum": ['é\u0000"\\\u2028', "中文", ""]}}),
}


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
    assert follow(state_of(Constraint("json_object"), kind), '{"a": [1, {"b": null}]}', kind).can_end


PATTERNS = [
    r"[a-c]{2,4}\d+",
    r"^(yes|no)$", r"(?i:ok)/[a-f]{1,3}", r"é[à-ü]{1,3}🙂?", r"a#b//c|x\/y", "a\nb?", r"\$\d\$", r"x|",
    r"[^\x00-\x7f]{1,2}",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_samples_match_the_whole_expression(pattern: str, kind: str) -> None:
    for seed in range(12):
        text = text_of(sampled(state_of(Constraint("regex", pattern), kind), seed=seed), kind)
        assert re.fullmatch(pattern, text), text


CHOICES = ("yes", "no", "", "nope", 'a"b\\c/', "tab\tline\nend", "Zoë 🙂", "中文", "#//x", "\x7f\x00", "{}|()*")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_choice_and_nothing_else(kind: str) -> None:
    constraint = Constraint("choice", CHOICES)
    for choice in CHOICES:
        assert follow(state_of(constraint, kind), choice, kind).can_end
    found = {text_of(sampled(state_of(constraint, kind), seed=seed, end=0.5), kind) for seed in range(150)}
    assert found <= set(CHOICES)
    assert len(found) > 5


LARK = """
start: expr
expr: term (("+" | "-") term)*
term: NUMBER | "(" expr ")"
NUMBER: /[0-9]{1,3}/
"""


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
    assert not state.can_end
    assert not set(ends) & set(ids_of(state.allowed()))
    follow(state, "a")
    assert state.can_end
    assert not state.must_end
    assert set(ends) < set(ids_of(state.allowed()))
    for token in (*ends, *ends):
        state.accept(token)
        assert state.is_finished
        assert state.must_end
        assert ids_of(state.allowed()) == ends
    with pytest.raises(ConstraintFailed):
        state.accept(encoded("b")[0])
    state.rollback(4)
    assert not state.is_finished
    assert state.allows(encoded("b")[0])


def test_what_is_complete_must_end() -> None:
    state = follow(state_of(Constraint("choice", ("yes", "no"))), "yes")
    assert state.must_end
    assert ids_of(state.allowed()) == sorted(compiler().vocabulary.eos_ids)


def test_special_tokens_only_where_a_grammar_names_them() -> None:
    tool_call = tokenizer("bpe").token_id("<tool_call>")
    specials = compiler().vocabulary.special_ids - compiler().vocabulary.eos_ids
    wide = state_of(Constraint("regex", r"(?s:.*)"))
    assert not specials & set(ids_of(wide.allowed()))
    assert follow(wide, "<tool_call>").can_end  # spelled out it is text
    named = state_of(Constraint("lark", 'start: <tool_call> "x"'))
    assert ids_of(named.allowed()) == [tool_call]
    named.accept(tool_call)
    assert follow(named, "x").must_end


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


def test_reasoning_is_free_and_what_follows_is_not() -> None:
    end_of_thought = tokenizer("bpe").token_id("</think>")
    state = state_of(Constraint("choice", ("yes", "no"), starts_after=(end_of_thought,)))
    eos = sorted(compiler().vocabulary.eos_ids)
    for token in encoded('Hmm, {"maybe"'):
        assert state.is_asleep
        assert not state.can_end
        assert not set(eos) & set(ids_of(state.allowed()))  # ending here would drop the constraint
        state.accept(token)
    state.accept(end_of_thought)
    assert not state.is_asleep
    assert np.array_equal(state.allowed(), state_of(Constraint("choice", ("yes", "no"))).allowed())
    follow(state, "no")
    assert state.must_end
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


def hybrid(kind: str, value: object) -> Constraint:
    """A constraint of a model that may begin with a thought by itself."""
    made = tokenizer("bpe")
    end = (made.token_id("</think>"),)
    return Constraint(kind, value, starts_after=end, opened_by=made.token_id("<think>"))  # type: ignore[arg-type]


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
    assert state.is_asleep and not state.can_end
    for token in encoded("hm, no"):
        state.accept(token)
    state.accept(end)
    assert np.array_equal(state.allowed(), bare.allowed()), "a second thought is none"
    follow(state, "yes")
    state.rollback(state.num_tokens - 2)
    assert state.is_asleep
    state.rollback(2)
    follow(state, "no")
    assert state.can_end and state.must_end


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


CONSTRAINTS = [
    hybrid("json_object", ""),
    hybrid("choice", CHOICES),
    Constraint("json_schema", SCHEMAS["person"]),
    Constraint("json_schema", SCHEMAS["tree"]),
    Constraint("json_object"),
    Constraint("regex", PATTERNS[0]),
    Constraint("choice", CHOICES),
    Constraint("lark", LARK),
    Constraint("lark", 'start: a "!"\na[lazy]: /.*x/'),
    Constraint("regex", "[a-z]{1,9}", starts_after=(70,)),
]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
def test_rollback_is_as_if_never_accepted(constraint: Constraint) -> None:
    draw = random.Random(5)
    state = state_of(constraint)
    past: list[tuple[np.ndarray, bool, bool]] = []
    for _ in range(150):
        ids = ids_of(state.allowed())
        past.append((state.allowed().copy(), state.can_end, state.is_asleep))
        state.accept(70 if 70 in ids and draw.random() < 0.1 else draw.choice(ids))
        if draw.random() < 0.3:
            count = draw.randint(1, min(6, state.num_tokens))
            state.rollback(count)
            del past[state.num_tokens + 1 :]
            mask, can_end, is_asleep = past.pop()
            assert np.array_equal(state.allowed(), mask)
            assert (state.can_end, state.is_asleep) == (can_end, is_asleep)
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
    assert state.must_end
    assert not other.can_end
    assert follow(other, "ea").must_end


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


def test_masks_are_applied_to_their_rows_alone() -> None:
    size = compiler().vocabulary.size
    logits_RY = torch.randn(4, size + 40)
    before_RY = logits_RY.clone()
    states = [state_of(CONSTRAINTS[3]), None, state_of(CONSTRAINTS[0]), state_of(CONSTRAINTS[4])]
    apply_masks(logits_RY, [None if state is None else state.allowed() for state in states])
    assert torch.equal(logits_RY[1], before_RY[1])
    for row, state in enumerate(states):
        if state is not None:
            ids = ids_of(state.allowed())
            assert torch.equal(logits_RY[row, ids], before_RY[row, ids])
            assert logits_RY[row].isfinite().sum() == len(ids)
            assert (logits_RY[row].isfinite() | (logits_RY[row] == -math.inf)).all()


def nested(schema: object, depth: int) -> object:
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE: dict[str, tuple[Constraint, bool | None]] = {  # and whether it compiles: None leaves it open
    "deep": (Constraint("json_schema", nested({"type": "string"}, 500)), False),
    "deep text": (Constraint("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000), False),
    "brackets": (Constraint("json_schema", "[" * 60000), False),
    "huge enum": (Constraint("json_schema", {"enum": [f"v{i}" for i in range(100_000)]}), False),
    "large enum": (Constraint("json_schema", {"enum": [f"v{i}" for i in range(2048)]}), True),
    "empty enum": (Constraint("json_schema", {"enum": []}), True),
    "properties": (Constraint("json_schema", closed(**{f"p{i}": {} for i in range(50_000)})), False),
    "pattern": (Constraint("json_schema", {"type": "string", "pattern": "(a{1000}){1000}"}), None),
    "repeats": (Constraint("regex", "(((((.{1,100}){1,100}){1,100}){1,100}){1,100})"), None),
    "overlaps": (Constraint("regex", "[ab]*a[ab]{24}"), None),
    "stars": (Constraint("regex", "(a+)+b"), True),
    "long regex": (Constraint("regex", "a" * 10**6), False),
    "look-behind": (Constraint("regex", "(?<=a)b"), False),
    "back-reference": (Constraint("regex", r"(a)\1"), False),
    "open regex": (Constraint("regex", "(a"), False),
    "backslash": (Constraint("regex", "a\\"), False),
    "nothing": (Constraint("regex", "[^\\s\\S]"), False),
    "ref cycle": (Constraint("json_schema", {"$ref": "#"}), False),
    "ref circle": (
        Constraint(
            "json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
        ),
        False,
    ),
    "remote ref": (Constraint("json_schema", {"$ref": "http://localhost/x"}), True),
    "file ref": (Constraint("json_schema", {"$ref": "file:///etc/passwd"}), True),
    "bounds": (Constraint("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}), False),
    "lengths": (Constraint("json_schema", {"type": "string", "minLength": 5, "maxLength": 3}), False),
    "false": (Constraint("json_schema", False), False),
    "true": (Constraint("json_schema", True), True),
    "type": (Constraint("json_schema", {"type": "stringg"}), False),
    "unknown format": (Constraint("json_schema", {"type": "string", "format": "foo"}), True),
    "relaxed": (Constraint("json_schema", {"type": "array", "uniqueItems": True}), True),
    "strict": (Constraint("json_schema", {"type": "array", "uniqueItems": True}, is_strict=True), False),
    "ref to nothing": (Constraint("json_schema", {"$ref": "#/$defs/a"}), False),
    "lenient": (Constraint("json_schema", {"x-guidance": {"lenient": True}, "not": {}}), False),
    "list": (Constraint("json_schema", "[]"), False),
    "number": (Constraint("json_schema", "1" * 5000), False),
    "nan": (Constraint("json_schema", {"maximum": math.nan}), False),
    "not json": (Constraint("json_schema", "{"), False),
    "object": (Constraint("json_schema", {"const": object()}), False),
    "surrogate": (Constraint("json_schema", {"const": "\ud800"}), False),
    "long string": (Constraint("json_schema", {"type": "string", "maxLength": 10**9}), True),
    "long array": (Constraint("json_schema", {"type": "array", "maxItems": 10**18, "minItems": 10**9}), None),
    "no choice": (Constraint("choice", ()), False),
    "choices": (Constraint("choice", tuple(f"c{i}" for i in range(100_000))), False),
    "many choices": (Constraint("choice", tuple(f"c{i}" for i in range(2_048))), True),
    "a string": (Constraint("choice", "yes"), False),
    "surrogate choice": (Constraint("choice", ("\udc00",)), False),
    "no lark": (Constraint("lark", " \n"), False),
    "long lark": (Constraint("lark", "start: " + "x" * 10**6), False),
    "lark as json": (Constraint("lark", '{"grammars": []}'), False),
    "chain": (
        Constraint("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "a"'),
        False,
    ),
    "deep chain": (
        Constraint("lark", "start: r0\n" + "\n".join(f"r{i}: (((r{i + 1})))" for i in range(498)) + '\nr498: "a"'),
        True,
    ),
    "steep chain": (
        Constraint(
            "lark", "start: r0\n" + "\n".join(f"r{i}: {'(' * 28}r{i + 1}{')' * 28}" for i in range(400)) + '\nr400: "a"'
        ),
        False,
    ),
    "left recursion": (Constraint("lark", 'start: start "a" | "b"'), None),
    "no way out": (Constraint("lark", "start: start"), False),
    "ambiguous": (Constraint("lark", 'start: s\ns: s s | "a" | '), None),
    "parentheses": (Constraint("lark", "start: " + "(" * 10000 + '"a"' + ")" * 10000), False),
    "unknown rule": (Constraint("lark", "start: x"), False),
    "max_tokens": (Constraint("lark", 'start: a "x"\na[max_tokens=3]: /.*/'), False),
    "stop": (Constraint("lark", 'start: a\na[stop="x"]: /.*/'), False),
    "billion": (Constraint("lark", 'start: ("a" "b"){1000000000}'), None),
    "kind": (Constraint("yaml", "x"), False),  # type: ignore[arg-type]
    "regex of bytes": (Constraint("regex", b"a"), False),  # type: ignore[arg-type]
    "start": (Constraint("regex", "a", starts_after=(10**9,)), False),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_work_or_are_refused_in_a_line(name: str) -> None:
    constraint, is_possible = HOSTILE[name]
    start = time.thread_time()
    try:
        state = compiler().compile(constraint).new_state()
    except UsageError as error:
        assert is_possible is not True, error
        assert "\n" not in str(error)
        assert 0 < len(str(error)) < 300
        assert "0x" not in str(error)
    else:
        assert is_possible is not False
        draw = random.Random(0)
        try:
            for _ in range(60):
                state.accept(draw.choice(ids_of(state.allowed())))
        except ConstraintFailed as error:
            assert "\n" not in str(error)
    assert time.thread_time() - start < 5
    # Nobody else notices.
    assert follow(state_of(Constraint("choice", ("yes", "no"))), "yes").must_end


def test_white_space_is_bounded() -> None:
    state = follow(state_of(Constraint("json_object")), "{")
    space = compiler().vocabulary.token_bytes.index(b" ")
    for _ in range(GrammarLimits().max_whitespace):
        state.accept(space)
    assert not state.allows(space)


def test_compiled_grammars_are_kept_by_content_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    small = GrammarCompiler(compiler().vocabulary, GrammarLimits(max_cached_grammars=3, max_cached_bytes=4 << 20))
    calls: list[str] = []
    ask = small._processes.ask
    monkeypatch.setattr(small._processes, "ask", lambda request, **more: calls.append(request) or ask(request, **more))
    small.compile(Constraint("regex", "a"))
    small.compile(Constraint("regex", "a", starts_after=(5,)))
    assert len(calls) == 1
    for pattern in ("b", "c", "d"):
        small.compile(Constraint("regex", pattern))
    small.compile(Constraint("regex", "d"))
    assert len(calls) == 4
    small.compile(Constraint("regex", "a"))  # was dropped
    assert len(calls) == 5
    for _ in range(2):
        with pytest.raises(UsageError):
            small.compile(Constraint("regex", "("))
    assert len(calls) == 6
    # What a grammar takes counts, not how long its text is: here a state for each remainder.
    for multiple in (3001, 3011, 3019):
        small.compile(Constraint("json_schema", {"type": "integer", "multipleOf": multiple}))
        assert small._held_bytes == sum(built.held_bytes for built in small._built.values()) <= 4 << 20
    assert 1 <= len(small._built) <= 2 and small._held_bytes > 1 << 20
    small.close()


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
    monkeypatch.setattr(matchers_module._Tokenizer, "__call__", lambda self, text: asked.append(text) or [])
    for constraint in CONSTRAINTS:
        sampled_or_cut(state_of(constraint))
    assert not asked


def sampled_or_cut(state: GrammarState) -> None:
    draw = random.Random(1)
    for _ in range(40):
        state.accept(draw.choice(ids_of(state.allowed())))


@pytest.mark.parametrize("size", [95, 96, 97, 128])
def test_masks_have_a_word_for_32_tokens(size: int) -> None:
    """Also where the vocabulary fills the last word exactly."""
    vocabulary = Vocabulary([bytes([32 + i]) for i in range(94)], eos_ids=(94,), size=size)
    state = GrammarCompiler(vocabulary).compile(Constraint("regex", r"[ -}]*")).new_state()
    assert len(state.allowed()) == (size + 31) // 32
    assert ids_of(state.allowed()) == list(range(95))
