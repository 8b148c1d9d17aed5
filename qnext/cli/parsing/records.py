"""Records of flags: a dataclass whose fields are options, as one parameter of a verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` as typer is to see it: the fields of a record stand in the place of the parameter that holds it."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    records: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}

    def call(**values: Any) -> Any:
        for name, record in records.items():
            values[name] = record(**{field.name: values.pop(field.name) for field in fields(record)})
        return command(**values)

    flags: list[inspect.Parameter] = []
    for each in parameters:
        flags += _flags_of(each.annotation) if each.name in records else [each.replace(kind=each.KEYWORD_ONLY)]
    call.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    call.__annotations__ = {flag.name: flag.annotation for flag in flags}
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    return call


def _flags_of(record: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    for field in fields(record):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )
