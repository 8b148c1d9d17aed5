"""Bodies with odd fields, by number: which fields there are is asked of the routes, so that new ones are tried as well.

Body `number` of a seed is the same on every machine. It changes one to four fields of a body that is answered, most
of the values being inside of what the field's schema says or just outside, and others of no type in particular.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from qnext.server.routes import Route
from qnext.server.table import public_routes
from tests.server.hostile.cases import VOCABULARY
from tests.server.hostile.field_values import NUMBERS, TEXTS
from tests.server.hostile.mutation import RICH
from tests.server.hostile.surfaces import MARK, Raw, Surface, encoded, surfaces

Path = tuple[Any, ...]  # of a field: keys and numbers of items

_MAX_DEPTH = 5  # of fields inside fields
_MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_TINY = [5e-324, -5e-324, 1e-320, 1e-310, 1e-45, 1e-40, 1e-38, 1e-37, 1e-20, 1e-10, 1e-7, 9e-6, 1e-5, 1e-3]
_HUGE = [3.4e38, 3.5e38, 1e300, 1.7e308]
_FLOATS = [*_TINY, *(0.0, -0.0, 0.1, 0.5, 1 - 2**-53, 1.0, 1 + 2**-52, 2.0, 3.5, 100.0, 1e9), *_HUGE]
_POWERS = [2**n + more for n in (31, 32, 53, 63, 64) for more in (-1, 0, 1)]
_INTEGERS = [*(0, 1, -1, 2, 7, 15, 16, 17, 20, 21, 255, 4096), *_POWERS]
_LITERALS = [
    math.nan,
    math.inf,
    -math.inf,
    Raw("1e400"),
    Raw("-1e400"),
    Raw("1e-400"),
    Raw("-0"),
    Raw("-0.0e-0"),
    Raw("1E+2"),
    Raw("1e" + "0" * 200 + "1"),
    Raw("1" + "0" * 400),
    Raw("-" + "9" * 400),
    Raw("0." + "0" * 400 + "1"),
]
_ODD = ["", " ", "a", "\x00", "\n", "\u2028", "\ufeff", "\U0010ffff", "0", "1", "-1", "1e-40", "nan", "true", "none"]
_LONG = [MARK * 30, "a" * 257, "a" * 3_000, "e" + "\u0301" * 300]
_STRINGS = [*_ODD, *_LONG, "<|im_end|>", "<think>", "{{7*7}}", "../../etc/passwd", MARK]


class Field(NamedTuple):
    """A field of a body, and what its schema says of it; 0 in the path is the first entry of a list."""

    path: Path
    schemas: tuple[Mapping[str, Any], ...]


class Attack(NamedTuple):
    surface: Surface
    raw: bytes


def body_routes() -> list[Route]:
    return [route for route in public_routes() if route.body is not None]


@cache
def fields(name: str) -> list[Field]:
    """All fields of a surface's body, the inner ones too."""
    model = surfaces()[name].route.body
    assert model is not None
    whole = model.model_json_schema()
    found: dict[Path, list[Mapping[str, Any]]] = {}
    for path, schema in _walk(whole, whole.get("$defs", {}), ()):
        found.setdefault(path, []).append(schema)
    return [Field(path, tuple(schemas)) for path, schemas in found.items()]


def _walk(
    schema: Mapping[str, Any], definitions: Mapping[str, Any], path: Path
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if path and not choices:
        yield path, schema
    if len(path) >= _MAX_DEPTH:
        return
    for choice in choices:
        yield from _walk(choice, definitions, path)
    for key, inner in schema.get("properties", {}).items():
        yield from _walk(inner, definitions, (*path, key))
    if isinstance(schema.get("items"), Mapping):
        yield from _walk(schema["items"], definitions, (*path, 0))


def attack(seed: int, number: int) -> Attack:
    """Body `number` of a seed."""
    rng = random.Random(f"{seed} {number}")
    every = list(surfaces().values())
    weights = [3 if surface.generates else 1 for surface in every]
    (surface,) = rng.choices(every, weights)
    body = copy.deepcopy(dict(surface.valid if rng.random() < 0.7 else RICH[surface.name]))
    every_field = fields(surface.name)
    outer = [field for field in every_field if len(field.path) == 1]  # few beside the inner ones, and they do most
    numbers = [field for field in outer if any(s.get("type") in ("number", "integer") for s in field.schemas)]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        field = rng.choice(rng.choice((every_field, outer, numbers or outer)))
        _set(body, field.path, _value(rng, field))
    return Attack(surface, _written(rng, body))


def _set(body: dict[str, Any], path: Path, value: Any) -> None:
    holder: Any = body
    for step, following in itertools.pairwise(path):
        inner = holder.get(step) if isinstance(holder, dict) else holder[0] if holder else None
        if not isinstance(inner, list if following == 0 else dict) or (following == 0 and not inner):
            inner = [None] if following == 0 else {}
            holder[step] = inner
        holder = inner
    holder[path[-1]] = value


def _value(rng: random.Random, field: Field) -> Any:
    name = field.path[-1]
    if rng.random() < 0.1 and (name in NUMBERS or name in TEXTS):
        return rng.choice(NUMBERS.get(name) or TEXTS[name])
    if name == "logit_bias" and rng.random() < 0.7:
        few = rng.sample(range(VOCABULARY), rng.choice((1, 5, VOCABULARY)))
        return {str(token): rng.choice((-100, 100, 5e-324, -1e-40, 99.5, 0)) for token in few}
    kind = rng.random()
    if kind < 0.7:
        return _inside(rng, rng.choice(field.schemas))
    return _near(rng, rng.choice(field.schemas)) if kind < 0.9 else _anything(rng, 2)


def _inside(rng: random.Random, schema: Mapping[str, Any]) -> Any:
    """What the schema allows, ends and the smallest numbers among it."""
    kind = schema.get("type")
    if kind in ("number", "integer"):
        low, high = schema.get("minimum", -100), schema.get("maximum", 100)
        above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        every = [low, high, *_INTEGERS, *(_FLOATS if kind == "number" else ())]
        return rng.choice([n for n in every if low <= n <= high and above < n < below])
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "string":
        return rng.choice([text for text in _STRINGS if len(text) <= schema.get("maxLength", 300)])
    if kind == "array":
        inner = schema.get("items") or {}
        return [] if "$ref" in inner or "oneOf" in inner else [_inside(rng, inner) for _ in range(rng.randint(1, 3))]
    if kind == "object":
        return {}
    return schema["const"] if "const" in schema else rng.choice(schema.get("enum", [None]))


def _near(rng: random.Random, schema: Mapping[str, Any]) -> Any:
    """Just inside or outside of what the schema says."""
    if "const" in schema:
        return rng.choice((schema["const"], f"{schema['const']}s"))
    if "enum" in schema:
        return rng.choice([*schema["enum"], schema["enum"][0].upper()])
    kind = schema.get("type")
    if kind in ("number", "integer"):
        ends = [schema[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in schema]
        end = rng.choice([*ends, 1])
        if kind == "integer":
            return rng.choice([end, end + 1, end - 1, end / 2, *_INTEGERS])
        beside = [end, math.nextafter(end, math.inf), math.nextafter(end, -math.inf), end / 2, end + 1e-40]
        return rng.choice(beside if rng.random() < 0.5 else _FLOATS)
    if kind == "boolean":
        return rng.choice((True, True, False, False, 0, "true"))
    if kind == "string":
        length = schema.get("maxLength", 100)
        return rng.choice((*_STRINGS, "x" * length, "x" * (length + 1)))
    if kind == "array":
        inner = schema.get("items") or {}
        most = min(schema.get("maxItems", 20), 2_000)
        count = rng.choice((0, 1, 2, 3, most, most + 1))
        return [_near(rng, inner) if "$ref" not in inner else _anything(rng, 1)] * count
    if kind == "object":
        return {str(rng.choice((1, 5, "a", "", "type", MARK))): _anything(rng, 1) for _ in range(rng.randint(0, 4))}
    return _anything(rng, 2)


def _anything(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind < 5:
        return rng.choice((_FLOATS, _INTEGERS, _LITERALS, _STRINGS, [None, True, False, [], {}])[kind])
    if kind == 5:
        return [_anything(rng, depth - 1) for _ in range(rng.choice((1, 2, 40)))]
    if kind == 6:
        return {rng.choice(_STRINGS[:12]): _anything(rng, depth - 1) for _ in range(rng.choice((1, 3)))}
    deep: Any = 1
    for _ in range(rng.choice((3, 30, 62, 70, 300))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def _written(rng: random.Random, body: dict[str, Any]) -> bytes:
    """As bytes; seldom in another encoding, cut, or with a key twice."""
    for name in _MAX_TOKENS:  # none, or more than the context holds, means all of it, and would take long
        value = body.get(name, 0)
        is_large = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 40
        if (is_large or value is None) and rng.random() < 0.95:
            body[name] = 16
    raw = encoded(body)
    fate = rng.random()
    if fate < 0.04 and body:
        key = rng.choice(list(body))
        raw = raw[:-1] + b"," + encoded({key: rng.choice((0, body[key]))})[1:]
    elif fate < 0.06:
        raw = raw.decode("utf-8", "surrogatepass").encode(
            rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-7")), "replace"
        )
    elif fate < 0.08:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif fate < 0.09:
        place = rng.randrange(len(raw))
        raw = raw[:place] + bytes([rng.randrange(256)]) + raw[place + 1 :]
    elif fate < 0.10:
        raw = b"\xef\xbb\xbf" + raw
    return raw
