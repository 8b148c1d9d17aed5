"""What a grammar may cost: hostile ones work or are refused, compiled ones are kept and bounded."""

from __future__ import annotations

import math
import random
import time

import pytest

from qnext.engine.sampling.constraint import Constraint, GrammarLimits
from qnext.engine.sampling.grammar import GrammarCompiler
from qnext.errors import ConstraintFailed, UsageError
from tests.engine.grammar_ends import must_end
from tests.engine.grammars import closed, compiler, follow, ids_of, state_of
from tests.pace import slowness


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
    assert time.thread_time() - start < 5 * slowness()
    # Nobody else notices.
    assert must_end(follow(state_of(Constraint("choice", ("yes", "no"))), "yes"))


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
