"""What the soak throws at a server, as data: bodies of every kind that once cost others something, with right answers.

An attack's statuses are those that a server may give to it: refused, answered, or told to come later.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

CONTEXT = 1_536  # of the served model
COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
LATER = (429, 503)

Body = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Attack:
    """One request, made anew each time. `weight` is how often it is chosen, against the others."""

    name: str
    group: str
    path: str
    body: Body
    statuses: tuple[int, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0


def _json(value: Any) -> Body:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda dice: raw


def _user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


def _numbers() -> list[Attack]:
    """Numbers at the ends of what a field or a float can hold: answered where they mean something, or refused."""
    odd: list[dict[str, Any]] = [
        {"repetition_penalty": 1e-40, "temperature": 1},
        {"repetition_penalty": 5e-324, "temperature": 1},
        {"repetition_penalty": 1e300},
        {"temperature": 1e-300},
        {"temperature": 5e-324, "top_p": 5e-324},
        {"temperature": 1e308},
        {"top_p": 1e-45, "temperature": 2},
        {"min_p": 1.0, "top_k": 1, "top_p": 1e-30},
        {"presence_penalty": 1e308, "frequency_penalty": -1e308},
        {"logit_bias": {"65": 1e38, "66": -1e38}},
        {"logit_bias": {str(token): -100 for token in range(250)}},
        {"top_k": 2**63},
        {"seed": 2**64},
        {"max_tokens": 2**53},
        {"n": -1},
    ]
    found = [
        Attack(
            f"numbers {str(body)[:60]}",
            "numbers",
            COMPLETIONS,
            _json({"prompt": "aa", "max_tokens": 4, **body}),
            (200, 400),
        )
        for body in odd
    ]
    nan = b'{"prompt": "a", "temperature": NaN}'
    return [*found, Attack("NaN", "numbers", COMPLETIONS, _json(nan), (400,))]


def _schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


def _grammars() -> list[Attack]:
    """What takes long to compile, or grows without end."""
    multiple = {"type": "integer", "multipleOf": 9_999_991}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": multiple}, "required": ["x"]}}
    tool = {"type": "function", "function": function}
    inside = json.dumps({"type": "object", "properties": {"x": multiple}, "required": ["x"]})
    nested = "a"
    for _ in range(12):
        nested = f"({nested}){{1,90}}"
    meet = " & ".join(f"/(.*[ab]){{{n}}}.*/" for n in range(30, 42))
    bombs: dict[str, dict[str, Any]] = {
        "multipleOf": _schema(multiple),
        "several multipleOf": _schema({"allOf": [{"type": "integer", "multipleOf": n} for n in (9_973, 9_967, 9_949)]}),
        "multipleOf in tools": {"tools": [tool], "tool_choice": "required"},
        "%json in Lark": {"guided_grammar": f"start: %json {inside}"},
        "intersections": {"guided_grammar": f"start: X\nX: {meet}"},
        "nested repetitions": {"guided_regex": nested},
        "long repetition": {"guided_regex": "(a|b|c|[0-9]{1,5}){1,100000}"},
        "many branches": _schema(
            {"anyOf": [{"type": "object", "properties": {f"k{n}": multiple}} for n in range(300)]}
        ),
        "parentheses": {"guided_regex": "(" * 900},
        "deep schema": _schema(_deep(400)),
        "lookbehind": {"guided_regex": "(?<=a)b(?!c)"},
    }
    # Compiled results are kept by hash: with a number of its own each is new work.
    return [
        Attack(f"grammar {name}", "grammars", CHAT, _fresh(_user("a", **body)), (200, 400, *LATER), weight=0.4)
        for name, body in bombs.items()
    ]


def _fresh(body: dict[str, Any]) -> Body:
    raw = json.dumps(body)

    def make(dice: random.Random) -> bytes:
        return raw.replace("9999991", str(dice.randrange(9_000_001, 9_999_999, 2))).encode()

    return make


def _deep(levels: int) -> Any:
    value: Any = {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"x": value}, "required": ["x"]}
    return value


def _large() -> list[Attack]:
    """Bodies of megabytes, and answers of them."""
    words = "the cat sat on the mat and " * 80_000  # 2.1 MB
    solid = "a" * 2_000_000
    odd = "\u00e9\U0001f600\u4f60 " * 200_000
    refused = (400, 413, 429)
    ids = [65 + n % 26 for n in range(CONTEXT - 16)]
    scored = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 5, "temperature": 0}
    attacks = [
        Attack(f"tokenize {name}", "large", "/tokenize", _json({"prompt": text}), (200, *refused))
        for name, text in (("words", words), ("one word", solid), ("odd text", odd))
    ]
    attacks += [
        Attack(
            "count 2 MB",
            "large",
            "/v1/messages/count_tokens",
            _json({"model": "claude-x", "messages": [{"role": "user", "content": words}]}),
            (200, *refused),
        ),
        Attack("detokenize many", "large", "/detokenize", _json({"tokens": [65] * 200_000}), (200, *refused)),
        Attack("8 MB prompt", "large", COMPLETIONS, _json({"prompt": "a" * 8_380_000}), refused),
        Attack("8 MB of ids", "large", COMPLETIONS, _json({"prompt": [65] * 2_000_000}), refused),
        Attack("8 MB of messages", "large", CHAT, _json(_user("b" * 8_380_000)), refused),
        Attack("8 MB of empty lists", "large", CHAT, _json(b'{"messages":[' + b"[]," * 2_790_000 + b"[]]}"), refused),
        Attack("8 MB that is no JSON", "large", MESSAGES, _json(b"{" * 8_380_000), refused),
        Attack("above the limit", "large", COMPLETIONS, _json(b" " * 8_388_609), (413,)),
        Attack("prompt_logprobs", "large", COMPLETIONS, _json(scored), (200, 400, *LATER), weight=4.0),
        Attack(
            "echo and logprobs",
            "large",
            COMPLETIONS,
            _json({"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 5}),
            (200, 400, *LATER),
            weight=4.0,
        ),
    ]
    return attacks


def _names() -> list[Attack]:
    """Pages of elsewhere: other hosts by DNS rebinding, other origins."""
    small = _json({"prompt": "a", "max_tokens": 1})
    hosts = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "2130706433", "[::1].evil", ""]
    found = [Attack(f"host {host!r}", "names", COMPLETIONS, small, (400, 421), {"Host": host}) for host in hosts]
    origins = ["http://evil.example", "null", "http://localhost.evil.example", "file://"]
    return found + [Attack(f"origin {one}", "names", COMPLETIONS, small, (403,), {"Origin": one}) for one in origins]


def _salts() -> list[Attack]:
    def body(dice: random.Random) -> bytes:
        text = f"{dice.randrange(10**9)} tells a long story. " * 20
        return json.dumps({"prompt": text, "max_tokens": 1, "cache_salt": f"s{dice.random()}"}).encode()

    return [Attack("many salts", "salts", COMPLETIONS, body, (200, *LATER), weight=12.0)]


def _broken() -> list[Attack]:
    """Bodies without a meaning."""
    image = {"role": "user", "content": [{"type": "image_url"}]}
    bodies: list[tuple[str, Any]] = [
        (COMPLETIONS, b"[" * 100_000),
        (COMPLETIONS, {"prompt": [99_999_999]}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [image]}),
        (CHAT, _user("a", n=1_000_000)),
        (COMPLETIONS, {"prompt": "a" * 1_000_000}),
        (MESSAGES, {"model": "x"}),
        ("/tokenize", {"prompt": 5}),
        (COMPLETIONS, b"\xff\xfe"),
        (CHAT, b""),
    ]
    return [
        Attack(f"broken {number}", "broken", path, _json(body), (400, 413))
        for number, (path, body) in enumerate(bodies)
    ]


ATTACKS = [*_numbers(), *_grammars(), *_large(), *_names(), *_salts(), *_broken()]
# What is no single request: connections that are not HTTP, and streams that nobody reads.
GROUPS = (*dict.fromkeys(attack.group for attack in ATTACKS), "wire", "stalled")
