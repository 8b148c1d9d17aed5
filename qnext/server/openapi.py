"""The OpenAPI document of the routes. Bodies come from their models, errors and authentication from the
declarations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from qnext.server.routes import Route
from qnext.version import __version__

_REF = "#/components/schemas/{model}"
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_BODY_ERRORS = {
    400: "what the body asks cannot be",
    408: "the body came too late",
    413: "the body is too large",
    415: "the body is not JSON",
}
_GUARD_ERRORS = {
    400: "not readable",
    403: "a page of another origin asks",
    421: "not a name of this server",
    431: "the headers are too large",
}
_GENERATION_ERRORS = {404: "no such model", 429: "the key's limit", 504: "the request took too long"}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """OpenAPI 3.1 of the routes."""
    models = {route.body for route in routes if route.body is not None}
    _, schemas = models_json_schema([(model, "validation") for model in sorted(models, key=_name)], ref_template=_REF)
    components: dict[str, Any] = dict(schemas.get("$defs", {}))
    components |= {"OpenAIError": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "qnext", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _name(model: type) -> str:
    return model.__name__


def _operation(route: Route) -> dict[str, Any]:
    error = {"$ref": f"#/components/schemas/{'AnthropicError' if route.errors == 'anthropic' else 'OpenAIError'}"}
    texts = dict(_GUARD_ERRORS)
    if route.scope != "public":
        texts |= {
            401: "no valid key",
            403: "the key lacks a scope, or a page of another origin asks",
            429: "too many wrong keys, or the key's limit",
        }
    if route.body is not None:
        texts |= _BODY_ERRORS
    if route.limit == "generation":
        texts |= _GENERATION_ERRORS
    if "{" in route.path or route.body is not None:
        texts |= {404: "no such thing"}
    if route.limit in ("generation", "work", "light") or route.path in ("/health", "/health/ready"):
        texts |= {503: "not ready, or full"}
    content: dict[str, Any] = {"application/json": {"schema": route.answer or {}}}
    if route.streams:
        content["text/event-stream"] = {}
    if route.content_type is not None:
        content = {route.content_type: {"schema": {"type": "string"}}}
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{route.path}".replace("/", "_").replace("{", "").replace("}", ""),
        "summary": route.summary,
        "security": [] if route.scope == "public" else [{"bearer": []}, {"key": []}],
        "responses": {
            "200": {"description": "done", "content": content},
            **{
                str(status): {"description": text, "content": {"application/json": {"schema": error}}}
                for status, text in sorted(texts.items())
            },
        },
    }
    if route.path == "/health/ready":
        operation["responses"]["503"]["content"] = content
    if route.limit == "static":
        operation["responses"]["304"] = {"description": "not changed"}
    names = [part.strip("{}").split(":")[0] for part in route.path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.body is not None:
        reference = {"$ref": _REF.format(model=_name(route.body))}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return operation
