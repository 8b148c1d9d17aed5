"""What an output constraint says, checked for size, and written as one grammar text. Neither torch nor a library.

Everything becomes Lark: one language, one set of options, one place where limits are held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qnext.engine.sampling.gbnf import is_gbnf, lark_of
from qnext.engine.sampling.schemas import enforceable
from qnext.errors import UsageError

ConstraintKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "calls"]
LarkWriter = Callable[[Mapping[str, Any]], str]  # what a constraint of some kind says -> its Lark; raises UsageError

# Masks hold every token that fits, not only the one that a tokenizer would have chosen for bytes that are certain:
# a draft that spells them otherwise is as right.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_JSON = re.compile(r"%json\s*")
_RULE = re.compile(r"^[ \t]*[!?_]*[A-Za-z][\w-]*(?:\{[^}\n]*\}|\[[^\]\n]*\]|\.[+-]?\d+|::\w+)*[ \t]*:", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """What the output must look like."""

    kind: ConstraintKind
    value: str | bool | Mapping[str, Any] | tuple[str, ...] = ""
    """A JSON schema (text, object or boolean), a regular expression that the whole output must match, the choices, or a
    grammar: Lark with the rule `start`, or GBNF with `root`. It is not read for "json_object". What "calls" holds is
    known to the program that compiles it, which has a writer for it."""

    starts_after: tuple[int, ...] | None = None
    """Token ids that end the reasoning: the constraint holds for what follows their first appearance in the output."""

    is_strict: bool = False
    """A schema that cannot be enforced whole is refused, not relaxed."""

    alternative: str | Mapping[str, Any] | None = None
    """Lark, or the value of "calls", that the output may be instead."""

    opened_by: int | None = None
    """The id that begins the reasoning where the output itself may do so, with its first token: without it the
    constraint holds from the beginning. A constraint that can begin with that mark describes the reasoning itself, and
    holds from the beginning in any case."""


@dataclass(frozen=True)
class GrammarLimits:
    """How large a constraint may be, and what compiling it, one mask and the cache may cost."""

    max_schema_bytes: int = 64 << 10
    max_schema_nodes: int = 2_000  # objects and lists of the schema
    max_schema_depth: int = 32
    max_enum_values: int = 2_048  # of all enums together
    max_pattern_properties: int = 32  # together: the library compares every two of an object
    max_regex_length: int = 1_024  # characters, also of each pattern in a schema
    max_choices: int = 2_048
    max_choice_bytes: int = 16 << 10  # of all choices together
    max_lark_bytes: int = 32 << 10
    max_lark_rules: int = 500
    max_lark_marks: int = 2_000  # colons and opening brackets, wherever they stand
    max_whitespace: int = 64  # characters in a row between the parts of a JSON text
    max_calls_bytes: int = 1 << 20  # of the schemas of all tools
    max_held_bytes: int = 24 << 20  # of what one grammar is compiled to
    compile_cpu_seconds: float = 1.0  # in a child process, and no more again in this one
    compile_memory_bytes: int = 128 << 20  # beside vocabulary and library
    compile_seconds: float = 10.0  # on the clock, which a busy machine may need for that
    process_memory_bytes: int = 2 << 30  # of address space, vocabulary and library with it
    compile_processes: int = 2
    max_waiting: int = 128  # constraints that wait to be compiled, each text of an owner once
    max_waiting_per_owner: int = 32
    wait_seconds: float = 30.0  # until a constraint is compiled
    step_seconds: float = 0.1  # of the thread's own time, for one mask; fuel ends nearly every case far below
    mask_seconds: float = 0.002  # for a mask on the average; what an answer saves it may spend, up to step_seconds
    token_seconds: float = 0.00015  # the same for accepting a token, which bounds the memory of an answer as well
    max_cached_grammars: int = 64  # and eight times as many refusals
    max_cached_bytes: int = 64 << 20  # of what grammars are compiled to
    max_lexer_states: int = 20_000  # 1 to 2 kB each, for every request
    max_grammar_size: int = 100_000
    initial_lexer_fuel: int = 1_000_000
    step_lexer_fuel: int = 200_000
    step_max_items: int = 50_000
    max_items_in_row: int = 2_000


def request_of(constraint: Constraint, limits: GrammarLimits) -> dict[str, Any]:
    """What a constraint says, as values of JSON, for `constraint_of`. Takes no longer than the limits are large.

    Raises UsageError, in one line, for what is too large or no value of JSON.
    """
    value = constraint.value
    kind = constraint.kind
    if kind == "json_object":
        value = ""
    if not isinstance(value, (str, bool, Mapping, tuple, list)):
        raise UsageError(f"{kind}: must be a string, not {type(value).__name__}")
    check_volume(kind, value, _volumes(limits).get(kind, limits.max_lark_bytes))
    if constraint.alternative is not None:
        check_volume("tools", constraint.alternative, limits.max_calls_bytes)
    return {
        "kind": kind,
        "value": list(value) if isinstance(value, tuple) else value,
        "is_strict": constraint.is_strict,
        "alternative": constraint.alternative,
    }


def constraint_of(request: Mapping[str, Any]) -> Constraint:
    return Constraint(
        request["kind"], request["value"], is_strict=request["is_strict"], alternative=request["alternative"]
    )


def _volumes(limits: GrammarLimits) -> dict[str, int]:
    return {
        "json_schema": limits.max_schema_bytes,
        "regex": 4 * limits.max_regex_length,
        "choice": limits.max_choice_bytes,
        "calls": limits.max_calls_bytes,
    }


def check_volume(kind: str, value: object, limit: int) -> None:
    """Refuse what is larger as JSON text than its limit, without writing it: that could take long."""
    name = "tools" if kind == "calls" else kind
    waiting: list[Any] = [[value]]
    volume = 0
    while waiting:
        item = waiting.pop()
        volume += len(item)
        if isinstance(item, Mapping):
            volume += sum(len(key) for key in item if isinstance(key, str))
            item = item.values()
        if volume <= limit:
            for entry in item:
                if isinstance(entry, str):
                    volume += len(entry)
                elif isinstance(entry, (Mapping, list, tuple)):
                    waiting.append(entry)
        if volume > limit:
            raise UsageError(f"{name}: larger than {limit} bytes")


def grammar_text(
    constraint: Constraint, limits: GrammarLimits, *, writers: Mapping[str, LarkWriter] | None = None
) -> str:
    """The Lark grammar of a constraint. Raises UsageError, in one line, for what is malformed or too large.

    What is quadratic in a constraint is computed here: call it where that can be stopped.
    """
    text = _own_text(constraint, limits, writers or {})
    if constraint.alternative is None:
        return text
    kind: ConstraintKind = "lark" if isinstance(constraint.alternative, str) else "calls"
    other = _own_text(Constraint(kind, constraint.alternative), limits, writers or {})
    either = "".join(
        f"{name}: %lark {{\n{grammar.replace(_OPTIONS, '')}}}\n" for name, grammar in (("own", text), ("other", other))
    )
    return f"{_OPTIONS}start: own | other\n{either}"


def _own_text(constraint: Constraint, limits: GrammarLimits, writers: Mapping[str, LarkWriter]) -> str:
    value = constraint.value
    writer = writers.get(constraint.kind)
    if writer is not None and isinstance(value, Mapping):
        return f"{writer(value)}\n{_OPTIONS}"
    if constraint.kind == "json_schema":
        schema = _checked_schema(value, limits)
        return _json_text(enforceable(schema, is_strict=constraint.is_strict).schema, limits)
    if constraint.kind == "json_object":
        return _json_text({"type": "object"}, limits)
    if constraint.kind == "choice":
        return _choice_text(value, limits)
    if not isinstance(value, str):
        raise UsageError(f"{constraint.kind}: must be a string, not {type(value).__name__}")
    if constraint.kind == "regex":
        return _regex_text(value, limits)
    if constraint.kind == "lark":
        return _lark_text(value, limits)
    raise UsageError("the kind of an output constraint must be json_schema, json_object, regex, choice or lark")


def _json_text(schema: dict[str, Any], limits: GrammarLimits) -> str:
    # Unbounded white space is how a model that does not know what to write fills its whole allowance.
    options = {"whitespace_pattern": rf"[ \t\n\r]{{1,{limits.max_whitespace}}}", "coerce_one_of": True}
    return _OPTIONS + "start: %json " + json.dumps({**schema, "x-guidance": options}, allow_nan=False) + "\n"


def _checked_schema(value: object, limits: GrammarLimits) -> dict[str, Any]:
    if isinstance(value, str):
        _check_size("json_schema", value, limits.max_schema_bytes)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UsageError("json_schema: not valid JSON") from None
    if value is True:
        return {}
    if value is False:
        raise UsageError("json_schema: the schema false allows no output")
    if not isinstance(value, Mapping):
        raise UsageError(f"json_schema: must be an object, not {type(value).__name__}")
    check_nodes(value, limits)
    if "x-guidance" in value:
        raise UsageError("json_schema: x-guidance is not supported")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError("json_schema: not valid JSON") from None
    _check_size("json_schema", text, limits.max_schema_bytes)
    return dict(value)


def check_nodes(schema: Mapping[str, Any], limits: GrammarLimits) -> None:
    """Depth, nodes, enum values and lengths of patterns, without recursion. Raises UsageError."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    num_nodes = num_values = num_keyed = 0
    while waiting:
        value, depth = waiting.pop()
        num_nodes += 1
        if depth > limits.max_schema_depth:
            raise UsageError(f"json_schema: nested deeper than {limits.max_schema_depth}")
        if num_nodes > limits.max_schema_nodes:
            raise UsageError(f"json_schema: more than {limits.max_schema_nodes} objects and lists")
        if isinstance(value, Mapping):
            values = value.get("enum")
            num_values += len(values) if isinstance(values, list) else 0
            if num_values > limits.max_enum_values:
                raise UsageError(f"json_schema: more than {limits.max_enum_values} enum values")
            keyed = value.get("patternProperties")
            num_keyed += len(keyed) if isinstance(keyed, Mapping) else 0
            if num_keyed > limits.max_pattern_properties:
                raise UsageError(f"json_schema: more than {limits.max_pattern_properties} pattern properties")
            for pattern in [value.get("pattern"), *(keyed if isinstance(keyed, Mapping) else ())]:
                if isinstance(pattern, str) and len(pattern) > limits.max_regex_length:
                    raise UsageError(f"json_schema: a pattern is longer than {limits.max_regex_length} characters")
        children = value.values() if isinstance(value, Mapping) else value
        waiting.extend((child, depth + 1) for child in children if isinstance(child, (Mapping, list, tuple)))


def _regex_text(pattern: str, limits: GrammarLimits) -> str:
    if len(pattern) > limits.max_regex_length:
        raise UsageError(f"regex: longer than {limits.max_regex_length} characters")
    _check_size("regex", pattern, 4 * limits.max_regex_length)
    # The whole output must match, so an anchor at either end says nothing; the library knows none.
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1:
        pattern = pattern[:-1]
    return _OPTIONS + f"start: {_lark_regex(pattern)}\n"


def _lark_regex(pattern: str) -> str:
    """The pattern between slashes; no slash stands bare in it."""
    if not pattern:
        return '""'
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    if parts[-1] == "\\":
        raise UsageError("regex: ends in a single backslash")
    return "/" + "".join(r"\/" if part == "/" else part for part in parts) + "/"


def _choice_text(choices: object, limits: GrammarLimits) -> str:
    """All choices in one expression: a single lexeme, whatever their number."""
    if not isinstance(choices, (tuple, list)) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError("choice: must be a list of strings")
    if not choices:
        raise UsageError("choice: the list is empty")
    if len(choices) > limits.max_choices:
        raise UsageError(f"choice: more than {limits.max_choices} choices")
    _check_size("choice", "".join(choices), limits.max_choice_bytes)
    return _OPTIONS + "start: " + _lark_regex("|".join(f"(?:{_escaped(c)})" for c in dict.fromkeys(choices))) + "\n"


def _escaped(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c == " ") else f"\\x{{{ord(c):X}}}" for c in text)


def _lark_text(text: str, limits: GrammarLimits) -> str:
    _check_size("lark", text, limits.max_lark_bytes)
    if not text.strip():
        raise UsageError("lark: the grammar is empty")
    if is_gbnf(text):
        text = lark_of(text)
    # Rules and brackets are resolved by recursion: a chain of thousands of them would overflow the stack.
    if len(_RULE.findall(text)) > limits.max_lark_rules:
        raise UsageError(f"lark: more than {limits.max_lark_rules} rules")
    if sum(map(text.count, ":([")) > limits.max_lark_marks:
        raise UsageError(f"lark: more than {limits.max_lark_marks} colons and brackets")
    _check_schemas(text, limits)
    return f"{text}\n{_OPTIONS}"  # at the end, so that line numbers in messages are the user's


def _check_schemas(text: str, limits: GrammarLimits) -> None:
    """Hold the schemas inside a grammar to what other schemas are held to; what is no JSON the library refuses."""
    for found in _JSON.finditer(text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(schema, dict):
            schema.pop("x-guidance", None)
            check_nodes(schema, limits)
            enforceable(schema)


def _check_size(kind: str, text: str, limit: int) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise UsageError(f"{kind}: holds a lone surrogate and is not valid Unicode") from None
    if size > limit:
        raise UsageError(f"{kind}: {size} bytes, at most {limit} are allowed")
