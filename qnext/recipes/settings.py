"""`key=value` settings of a run to values of a dataclass's fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from qnext.errors import UsageError, did_you_mean


def parse_settings(settings: Iterable[str], *owners: type) -> list[dict[str, Any]]:
    """The values for each of the dataclasses. A key is a field of the first one that has it.

    Raises UsageError naming the setting when the key is unknown or the value does not parse.
    """
    found: list[dict[str, Any]] = [{} for _ in owners]
    known = [[each.name for each in fields(owner)] for owner in owners]
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: expected key=value")
        place = next((index for index, names in enumerate(known) if key in names), None)
        if place is None:
            everything = [name for names in known for name in names]
            raise UsageError(f"--set {key}: unknown; known are {', '.join(everything)}{did_you_mean(key, everything)}")
        found[place].pop(key, None)  # the last one counts, and stands last
        found[place][key] = parse_value(text, typing.get_type_hints(owners[place])[key], key)
    return found


def parse_value(text: str, wanted: Any, key: str) -> Any:
    """Text as a value of the type `wanted`; numbers of a tuple are divided by commas."""
    if isinstance(wanted, types.UnionType):
        if text == "none":
            return None
        wanted = next(option for option in typing.get_args(wanted) if option is not type(None))
    if typing.get_origin(wanted) is tuple:
        return tuple(parse_value(part, typing.get_args(wanted)[0], key) for part in text.split(","))
    if typing.get_origin(wanted) is typing.Literal or wanted is str:
        return text  # the dataclass checks which words are allowed
    if wanted is bool and text in ("true", "false"):
        return text == "true"
    if wanted in (int, float):
        try:
            return wanted(text)
        except ValueError:
            pass
    name = getattr(wanted, "__name__", str(wanted))
    raise UsageError(f"--set {key}={text}: expected a value of type {name}")


def with_end_of_run(train: dict[str, Any]) -> dict[str, Any]:
    """`total_steps` and `time_budget` replace each other; the later one counts."""
    ends = [key for key in train if key in ("total_steps", "time_budget") and train[key] is not None]
    return {**train, **{key: None for key in ("total_steps", "time_budget") if key != ends[-1]}} if ends else train
