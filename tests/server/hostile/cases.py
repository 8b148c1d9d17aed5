"""What a hostile body is: a change of a surface's valid body, and the answers that are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qnext.text.train import byte_level_tokenizer
from tests.server.hostile.surfaces import Surface

BAD = (400,)
FINE_OR_BAD = (200, 400)
VOCABULARY = byte_level_tokenizer().get_vocab_size() + 5  # of the tiny model


@dataclass(frozen=True)
class Case:
    """`change` makes the body from a surface's valid one: fields to set, or a function that gives the whole of it.

    `only` names surfaces; without it a case is for all that know its fields, and a function's for all. Bytes are sent
    as they are. `seconds` is how long an answer may take.
    """

    name: str
    change: Mapping[str, Any] | Callable[[Surface], Any]
    statuses: tuple[int, ...] = BAD
    only: tuple[str, ...] = ()
    seconds: float = 1.0
    is_heavy: bool = False  # left to the long form, or sent to one surface

    def suits(self, surface: Surface) -> bool:
        if self.only:
            return surface.name in self.only
        return callable(self.change) or all(surface.knows(field) for field in self.change)

    def body(self, surface: Surface) -> Any:
        return self.change(surface) if callable(self.change) else {**surface.valid, **self.change}
