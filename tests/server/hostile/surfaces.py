"""The surfaces that hostile inputs are tried on: a small valid body of each, and how an error of it must look."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qnext.server.routes import Route
from qnext.server.table import public_routes

MARK = "zqmarkerzq"  # stands in hostile text; no error may repeat it
_RAW = re.compile(r'"@@(.*?)@@"')


@dataclass(frozen=True)
class Raw:
    """Text that stands in a JSON body as it is, such as 1e400."""

    text: str


@dataclass(frozen=True)
class Surface:
    """One route that takes a body. `valid` is answered with 200; `holds` puts a text where its prompt stands."""

    name: str
    path: str
    valid: Mapping[str, Any]
    holds: Callable[[Any], Mapping[str, Any]]
    route: Route

    @property
    def style(self) -> str:
        return self.route.errors

    @property
    def generates(self) -> bool:
        return self.route.limit == "generation"

    def knows(self, field: str) -> bool:
        assert self.route.body is not None
        fields = self.route.body.model_fields
        return field in fields or any(info.alias == field for info in fields.values())


def _message(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


_BODIES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Mapping[str, Any]]]] = {
    "chat": ("/v1/chat/completions", {**_message("Hi"), "max_tokens": 2, "temperature": 0}, _message),
    "completions": (
        "/v1/completions",
        {"prompt": "Hi", "max_tokens": 2, "temperature": 0},
        lambda text: {"prompt": text},
    ),
    "responses": (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 16, "temperature": 0},
        lambda text: {"input": text},
    ),
    "messages": ("/v1/messages", {**_message("Hi"), "model": "alias", "max_tokens": 2, "temperature": 0}, _message),
    "count_tokens": ("/v1/messages/count_tokens", {**_message("Hi"), "model": "alias"}, _message),
    "tokenize": ("/tokenize", {"prompt": "Hi"}, lambda text: {"prompt": text}),
    "detokenize": ("/detokenize", {"tokens": [72, 105]}, lambda text: {"tokens": text}),
}


def surfaces() -> dict[str, Surface]:
    """Those that the server has, by name."""
    routes = {route.path: route for route in public_routes() if route.method == "POST"}
    return {
        name: Surface(name, path, valid, holds, routes[path])
        for name, (path, valid, holds) in _BODIES.items()
        if path in routes
    }


def encoded(value: Any) -> bytes:
    """JSON of a body that may hold NaN, Infinity and Raw text."""
    text = json.dumps(value, default=lambda raw: f"@@{raw.text}@@", ensure_ascii=False, separators=(",", ":"))
    return _RAW.sub(r"\1", text).encode("utf-8", "surrogatepass")
