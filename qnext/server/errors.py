"""The errors that a client sees: one exception, one sanitiser, one body per style of API. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import orjson
from pydantic import ValidationError

from qnext.server.limits import MAX_ERROR_BYTES, MAX_ERROR_MESSAGE

ErrorStyle = Literal["openai", "anthropic"]

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|`[^`]*`")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_PATH = re.compile(r"(?<![\w/])/(?:[\w.@+-]+/)+[\w.@+-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_FREE_MAPS = ("logit_bias", "metadata", "chat_template_kwargs", "parameters", "input_schema", "input", "schema")
_WORD = re.compile(r"[^\s:,;()\[\]{}]{3,}")
# Words of messages and of JSON schemas. They are kept although the caller's text may hold them too.
_SCHEMA_WORDS = frozenset(
    [
        "json",
        "json_schema",
        "schema",
        "regex",
        "lark",
        "grammar",
        "choice",
        "start",
        "rule",
        "type",
        "string",
        "number",
        "integer",
        "boolean",
        "object",
        "array",
        "null",
        "properties",
        "required",
        "items",
        "pattern",
        "format",
        "enum",
        "const",
        "anyof",
        "oneof",
        "allof",
        "not",
        "additionalproperties",
        "prefixitems",
        "minlength",
        "maxlength",
        "minitems",
        "maxitems",
        "minimum",
        "maximum",
        "multipleof",
        "patternproperties",
        "definitions",
        "the",
        "and",
        "for",
        "too",
        "larger",
        "longer",
        "more",
        "than",
        "must",
        "invalid",
        "unknown",
        "expected",
        "failed",
        "compile",
        "tools",
        "takes",
        "time",
        "memory",
        "processor",
        "costly",
    ]
)
# Kinds of the Anthropic surface by status; 529 is its own for an overloaded server, but clients retry 503 alike.
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error answer. `message` contains nothing of the request except names of its fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @classmethod
    def bad(cls, message: str, *, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
        return cls(400, message, param=param, code=code)

    @classmethod
    def too_long(cls, num_tokens: int, maximum: int, *, is_least: bool = False, param: str | None = None) -> ApiError:
        """A prompt beyond the context. Agents recognise the words of this message and compact their conversation.

        `maximum` leaves room for one token of the answer. `is_least`: the prompt has at least `num_tokens` tokens.
        """
        count = f"at least {num_tokens}" if is_least else f"{num_tokens}"
        return cls.bad(
            f"prompt is too long: {count} tokens > {maximum} maximum (this model's maximum context length is "
            f"{maximum + 1} tokens)",
            param=param,
            code="context_length_exceeded",
        )

    @classmethod
    def busy(cls, message: str, *, retry_after: float, code: str = "overloaded", status: int = 503) -> ApiError:
        return cls(status, message, code=code, headers={"Retry-After": str(max(1, round(retry_after)))})

    @classmethod
    def over_limit(cls, message: str, *, retry_after: float) -> ApiError:
        """A caller asks for more than its share. It may try again after `retry_after` seconds."""
        return cls.busy(message, retry_after=retry_after, status=429, code="rate_limit_exceeded")

    @classmethod
    def internal(cls, message: str | None = None) -> ApiError:
        """A fault of the server. The log has its cause, under the request's id."""
        return cls(500, message or "internal error", code="internal_error", headers={"x-should-retry": "false"})


def from_user_error(error: Exception, *, param: str | None = None, source: str = "") -> ApiError:
    """An error of a lower room as status 400. Parts that could come from the caller or the machine are removed from its
    message.

    `source` is a text of the caller that a library's message may quote. Words of it become "…" too.
    """
    is_length = type(error).__name__ == "DoesNotFit"
    message = _WORD.sub(lambda found: _unless_from(source, found[0]), str(error)) if source else str(error)
    return ApiError.bad(
        sanitized(message), param=param, code="context_length_exceeded" if is_length else "invalid_value"
    )


def _unless_from(source: str, word: str) -> str:
    return "…" if word in source and word.lower() not in _SCHEMA_WORDS else word


def from_validation(error: ValidationError) -> ApiError:
    """The first fault of a body, with its place and without its value."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place: list[str] = []
    for part in first["loc"]:
        if isinstance(part, int):
            place.append(str(part))
        elif re.fullmatch(r"[a-z][a-z0-9_]{0,39}", part):
            place.append(part)
            if part in _FREE_MAPS and place != ["input"]:  # the input of a response is no map
                break
    where = ".".join(place)
    others = error.error_count() - 1
    more = f" (and {others} more)" if others else ""
    message = sanitized(first["msg"], keep_quoted=first["type"] in ("literal_error", "union_tag_invalid"))
    return ApiError.bad(
        f"{where}: {message}{more}" if where else f"{message}{more}", param=where or None, code=_code(first["type"])
    )


def _code(kind: str) -> str:
    return "missing_required_parameter" if kind == "missing" else "invalid_value"


def sanitized(text: str, *, keep_quoted: bool = False) -> str:
    """One short line without quoted text, addresses and paths."""
    text = _CONTROL.sub(" ", text)
    if not keep_quoted:
        text = _QUOTED.sub("…", text)
    text = _PATH.sub("…", _ADDRESS.sub("…", text))
    return text if len(text) <= MAX_ERROR_MESSAGE else text[: MAX_ERROR_MESSAGE - 1] + "…"


def style_of(path: str) -> ErrorStyle:
    """The style of errors where no route defines one."""
    return "anthropic" if path == "/v1/messages" or path.startswith("/v1/messages/") else "openai"


def error_object(error: ApiError, style: ErrorStyle) -> dict[str, Any]:
    """The body of an error, in the form of OpenAI's API or of Anthropic's."""
    message = error.message
    if style == "anthropic" and error.param is not None and not message.startswith(error.param):
        message = f"{error.param}: {message}"  # its errors have no place for it
    message = message[:MAX_ERROR_MESSAGE]
    if style == "anthropic":
        kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = _OPENAI.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_body(error: ApiError, style: ErrorStyle) -> bytes:
    body = orjson.dumps(error_object(error, style))
    assert len(body) <= MAX_ERROR_BYTES
    return body
