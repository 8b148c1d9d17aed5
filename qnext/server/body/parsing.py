"""Parses the bytes of a body into the model of its route. No step holds the interpreter's lock for long."""

from __future__ import annotations

import threading
from functools import cache
from itertools import islice
from typing import Any, get_args, get_origin

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from qnext.collecting import without_collecting
from qnext.server.body.double_keys import check_keys
from qnext.server.errors import ApiError, from_validation
from qnext.server.lanes import LARGE
from qnext.server.limits import MAX_JSON_CONTAINERS, MAX_JSON_DEPTH, MAX_JSON_MEMBERS, MAX_JSON_VALUES

_SLICE = 1 << 16  # bytes that are looked at together
_BACKSLASH = ord("\\")
_CONTAINERS = frozenset((dict, list))
_SIZES = (
    ((b"[", b"{"), MAX_JSON_CONTAINERS, "objects and lists"),
    ((b":",), MAX_JSON_MEMBERS, "members of objects"),
    ((b",",), MAX_JSON_VALUES, "values"),
)
# What a body may hold that is read in the event loop: a millisecond or two of work.
_SMALL = (((b"[", b"{"), 256), ((b",",), 2_048))
_MAX_UNKNOWN = 512  # members of the body itself that no model has; nobody looks at more
_MANY_ITEMS = 16  # of a list whose items are looked at one by one
_loading = threading.Lock()  # while the collector is held off
_load_json = without_collecting(orjson.loads)


def is_small(raw: bytes) -> bool:
    """Whether a body of this size is parsed within a millisecond or two, whatever it holds."""
    return len(raw) <= LARGE and all(sum(map(raw.count, marks)) <= most for marks, most in _SMALL)


def parse_body(raw: bytes, model: type[BaseModel]) -> BaseModel:
    """The body as a model. Raises ApiError 400 for a body that is no JSON, too deeply nested, or not of the model's
    form."""
    _check_size(raw)
    try:
        value = orjson.loads(raw) if len(raw) <= LARGE else _loaded(raw)
    except orjson.JSONDecodeError:
        raise ApiError.bad("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError.bad("the body must be a JSON object", code="invalid_json")
    _check_depth(value)
    check_keys(raw, value, model)
    try:
        return model.model_validate(_with_items(model, _known(model, value)))
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise ApiError.bad("the body is nested too deeply", code="invalid_json") from None


def _loaded(raw: bytes) -> Any:
    """JSON read while the garbage collector is off: its looks at the growing heap take longer than the reading."""
    with _loading:
        return _load_json(raw)


def _known(model: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """The value with all known members and at most so many unknown ones as somebody looks at."""
    if len(value) <= _MAX_UNKNOWN:
        return value
    return {
        **dict(islice(value.items(), _MAX_UNKNOWN)),
        **{name: value[name] for name in _names(model) if name in value},
    }


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    fields = model.model_fields.items()
    return frozenset(alias if isinstance(alias := field.alias, str) else name for name, field in fields)


def _with_items(model: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """The value with the items of its long lists made models one by one, so that other threads get a turn between.

    From the first faulty item on a list stays as it is: the validation of the whole then names the fault.
    """
    for name, adapter in _item_types(model).items():
        items = value.get(name)
        if not isinstance(items, list) or len(items) < _MANY_ITEMS:
            continue
        made: list[Any] = []
        try:
            for item in items:
                made.append(adapter.validate_python(item, strict=True))
        except ValidationError:
            pass
        value[name] = [*made, *items[len(made) :]]
    return value


@cache
def _item_types(model: type[BaseModel]) -> dict[str, TypeAdapter[Any]]:
    """The types of the items of a model's lists, where these are models."""
    found = {name: _item_type(field.annotation) for name, field in model.model_fields.items()}
    return {name: TypeAdapter(item) for name, item in found.items() if item is not None and _holds_models(item)}


def _item_type(annotation: Any) -> Any:
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    return next((item for part in get_args(annotation) if (item := _item_type(part)) is not None), None)


def _holds_models(annotation: Any) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, BaseModel)
    return any(map(_holds_models, get_args(annotation)))


def _check_size(raw: bytes) -> None:
    """Refuse bodies of very many small values. They are counted by their marks: parsing takes fifty times the bytes."""
    if all(sum(map(raw.count, marks)) <= most for marks, most, _ in _SIZES):
        return
    counts = [0] * len(_SIZES)  # outside of strings
    is_string = False
    begin = 0
    while begin < len(raw):
        end = _behind_escapes(raw, begin + _SLICE)
        texts = raw[begin:end].replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        outside = b"".join(texts[is_string::2])
        is_string ^= len(texts) % 2 == 0
        begin = end
        for index, (marks, most, what) in enumerate(_SIZES):
            counts[index] += sum(map(outside.count, marks))
            if counts[index] > most:
                raise ApiError.bad(f"the body has more than {most} {what}", code="invalid_json")


def _behind_escapes(raw: bytes, place: int) -> int:
    """`place`, or the first one behind it that does not follow a backslash."""
    while 0 < place < len(raw) and raw[place - 1] == _BACKSLASH:
        place += 1
    return place


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        children: list[Any] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            if not _CONTAINERS.isdisjoint(map(type, items)):  # a long list of numbers is passed over quickly
                children.extend(item for item in items if isinstance(item, (dict, list)))
        if not children:
            return
        level = children
    raise ApiError.bad(f"the body is nested deeper than {MAX_JSON_DEPTH}", code="invalid_json")
