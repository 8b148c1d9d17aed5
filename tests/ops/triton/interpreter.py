"""Triton's interpreter without some of what it repeats.

Triton 3.7 looks through all names of its modules at each call of a function, though operators are exchanged at the
first one; and it computes each sum and product of integers twice, to see that it fits into 32 bits. Both together took
40 % of these tests. Slow tests still do the second.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_operators: dict[int, list[str]] = {}


def _members(module: Any) -> list[tuple[str, Any]]:
    """As inspect.getmembers, of what were operators at the first call: the interpreter asks for nothing else."""
    if id(module) not in _operators:
        _operators[id(module)] = [name for name in dir(module) if tl.core.is_builtin(getattr(module, name))]
    return [(name, getattr(module, name)) for name in _operators[id(module)]]


def repeat_less() -> None:
    """Of every later interpreted kernel."""
    interpreter.inspect = SimpleNamespace(**{**vars(interpreter.inspect), "getmembers": _members})


def look_for_overflows(*, are_sought: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=are_sought)
