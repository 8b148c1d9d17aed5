"""Hostile bodies as data. Each case is tried on every surface that knows the fields it sets.

To add one: put a value into `field_values`, or a Case into the list of its class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.server.hostile.cases import BAD, FINE_OR_BAD, Case
from tests.server.hostile.field_values import NUMBERS, TEXTS
from tests.server.hostile.prompt_cases import PROMPTS
from tests.server.hostile.schema_cases import STRUCTURED
from tests.server.hostile.surfaces import MARK, Raw, Surface

# ---- JSON ----


def _whole(raw: bytes) -> Callable[[Surface], bytes]:
    return lambda surface: raw


def _nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return f'{{"metadata": {opening * depth}{closing * depth}}}'.encode()


JSON = [
    Case("empty body", _whole(b"")),
    Case("white space", _whole(b"  \n ")),
    Case("null", _whole(b"null")),
    Case("list", _whole(b"[1]")),
    Case("text", _whole(f'"{MARK}"'.encode())),
    Case("number", _whole(b"42")),
    Case("no JSON", _whole(f"{{{MARK}}}".encode())),
    Case("single quotes", _whole(f"{{'{MARK}': 1}}".encode())),
    Case("trailing comma", _whole(b'{"model": "alias",}')),
    Case("trailing bytes", _whole(f'{{"model": "alias"}} {MARK}'.encode())),
    Case("two documents", _whole(b"{}{}")),
    Case("byte order mark", _whole(b"\xef\xbb\xbf{}")),
    Case("UTF-16", _whole('{"prompt": "x"}'.encode("utf-16"))),
    Case("UTF-32", _whole('{"prompt": "x"}'.encode("utf-32"))),
    Case("invalid UTF-8", _whole(b'{"prompt": "\xff\xfe"}')),
    Case("overlong UTF-8", _whole(b'{"prompt": "\xc0\xaf"}')),
    Case("encoded surrogate", _whole(b'{"prompt": "\xed\xa0\x80"}')),
    Case("lone surrogate", _whole(b'{"prompt": "\\ud800", "input": "\\ud800", "tokens": ["\\ud800"]}')),
    Case("swapped surrogates", _whole(b'{"prompt": "\\udc00\\ud800"}')),
    Case("bare control character", _whole(b'{"prompt": "a\x01b"}')),
    Case("bare NUL", _whole(b'{"prompt": "a\x00b"}')),
    Case("NUL alone", _whole(b"\x00")),
    Case("a million NULs", _whole(b"\x00" * 1_000_000)),
    Case("500,000 digits", _whole(b'{"max_tokens": ' + b"9" * 500_000 + b"}")),
    Case("500,000 digits of a fraction", _whole(b'{"temperature": -1.' + b"9" * 500_000 + b"}")),
    Case("a number and 10,000 zeros of exponent", _whole(b'{"temperature": 1e' + b"0" * 10_000 + b"9}")),
    Case("nested 65 lists", _whole(_nested(65))),
    Case("nested 1,000 lists", _whole(_nested(1_000))),
    Case("nested 100,000 lists", _whole(_nested(100_000))),
    Case("nested 100,000 objects", _whole(_nested(100_000, '{"a":', "}").replace(b":}", b":1}", 1))),
    Case("a million open brackets", _whole(b"[" * 1_000_000)),
    Case("two million empty lists", _whole(b'{"metadata": [' + b"[]," * 2_000_000 + b"[]]}"), is_heavy=True),
    Case("duplicate keys", _whole(b'{"model": "alias", "model": 5, "model": []}')),
    Case("100,000 unknown keys", lambda s: {**{f"{MARK}{i}": i for i in range(100_000)}, "model": 5}),
    Case("unknown keys are ignored", lambda s: {**s.valid, MARK: {"x": [1]}, "user": "u", "store": False}, (200,)),
    Case("key of a megabyte", lambda s: {**s.valid, MARK * 100_000: 1}, (200,)),
    Case("key of JavaScript", lambda s: {**s.valid, "__proto__": {"x": 1}, "constructor": 1}, (200,)),
    Case("empty object", _whole(b"{}")),
    Case("empty key", lambda s: {**s.valid, "": 1}, (200,)),
]


def field_cases() -> Iterator[Case]:
    """One case for each value of NUMBERS and TEXTS."""
    for field, values in (*NUMBERS.items(), *TEXTS.items()):
        for number, value in enumerate(values):
            yield Case(f"{field} {number}: {_shown(value)}", {field: value}, _EXPECTED.get((field, number), BAD))


# What some surface may also say: no such model, a field that it takes in another form, an answer that is empty.
_EXPECTED: dict[tuple[str, int], tuple[int, ...]] = {
    ("model", 4): (400, 404),
    ("guided_grammar", 4): FINE_OR_BAD,  # a grammar of nothing
    ("messages", 1): FINE_OR_BAD,  # null is as if it were not there, and tokenize has a prompt
    ("prompt", 0): FINE_OR_BAD,  # tokenize has nothing against no text
    ("input", 0): FINE_OR_BAD,  # nothing against a turn without text
    ("prompt", 3): FINE_OR_BAD,  # responses may have null for what they do not know
}


def _shown(value: Any) -> str:
    text = value.text if isinstance(value, Raw) else repr(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)})"


CLASSES = {"json": JSON, "fields": list(field_cases()), "prompts": PROMPTS, "structured": STRUCTURED}
