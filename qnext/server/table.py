"""All routes of the public listener. What a route may do is declared here and nowhere else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from qnext.server import probes
from qnext.server.errors import ErrorStyle
from qnext.server.metrics import CONTENT_TYPE
from qnext.server.routes import Handler, LimitClass, Route, Scope
from qnext.server.surfaces.anthropic.bodies import CountBody, MessagesBody
from qnext.server.surfaces.anthropic.messages import count_tokens, messages
from qnext.server.surfaces.openai import models
from qnext.server.surfaces.openai.chat import chat_completions
from qnext.server.surfaces.openai.chat_bodies import ChatBody
from qnext.server.surfaces.openai.completions import CompletionBody, completions
from qnext.server.surfaces.openai.responses import responses
from qnext.server.surfaces.openai.responses_bodies import ResponseBody

_OBJECT: dict[str, Any] = {"type": "object"}


def public_routes(*, with_page: bool = True, open_readiness: bool = False) -> list[Route]:
    """Every route of the public listener. The administrators' routes are not among them.

    `open_readiness`: /health/ready needs no key, because load balancers and kubelets have none.
    """
    routes = [
        *_generating(),
        *_about_the_model(),
        *_probes("public" if open_readiness else "any"),
        _get("/live/model", probes.live_model, "any", "light", "layers and limits, for the page", _OBJECT),
        Route(
            "GET",
            "/live/stream",
            probes.live_stream,
            "any",
            "generation",
            "openai",
            "access",
            "the model at work, for the page",
            content_type="text/event-stream",
        ),
        *(_page() if with_page else ()),
    ]
    handler = probes.openapi_handler(routes)
    routes.append(_get("/openapi.json", handler, "any", "static", "this document", _OBJECT))
    return routes


def _generating() -> list[Route]:
    choices = _with("id", "object", "created", "model", "choices", "usage")
    response = _with("id", "object", "model", "output", "status", "usage")
    message = _with("id", "type", "role", "content", "stop_reason", "usage")
    return [
        _generation("/v1/chat/completions", chat_completions, "answer a conversation", ChatBody, choices),
        _generation("/v1/completions", completions, "continue a text", CompletionBody, choices),
        _generation(
            "/v1/responses", responses, "answer a conversation, in OpenAI's newer form", ResponseBody, response
        ),
        _generation(
            "/v1/messages",
            messages,
            "answer a conversation, in Anthropic's form",
            MessagesBody,
            message,
            errors="anthropic",
        ),
    ]


def _about_the_model() -> list[Route]:
    tokens = _with("tokens", "count", "max_model_len")
    return [
        Route(
            "POST",
            "/v1/messages/count_tokens",
            count_tokens,
            "inference",
            "work",
            "anthropic",
            "access",
            "how many tokens a conversation has",
            CountBody,
            _with("input_tokens"),
        ),
        _get("/v1/models", models.list_models, "inference", "light", "the names of the model", _with("object", "data")),
        _get(
            "/v1/models/{model:path}",
            models.get_model,
            "inference",
            "light",
            "one name of the model",
            _with("id", "object"),
        ),
        _tokenizing("/tokenize", models.tokenize, "text to token ids", models.TokenizeBody, tokens),
        _tokenizing("/detokenize", models.detokenize, "token ids to text", models.DetokenizeBody, _with("prompt")),
        _get(
            "/tokenizer_info",
            models.tokenizer_info,
            "tokenize",
            "light",
            "what clients need of the tokenizer",
            _with("eos_token"),
        ),
    ]


def _probes(readiness: Scope) -> list[Route]:
    return [
        _health("/health/live", probes.health_live, "public", "whether the server lives", _with("status")),
        _health("/health/ready", probes.health_ready, readiness, "whether it takes requests", _with("status")),
        _health(
            "/health", probes.health, "public", "whether it takes requests, without a word", content_type="text/plain"
        ),
        _get("/version", models.version, "any", "probe", "the version", _with("version")),
        Route(
            "GET",
            "/metrics",
            probes.metrics,
            "metrics",
            "probe",
            "openai",
            "access",
            "for Prometheus",
            content_type=CONTENT_TYPE.split(";")[0],
        ),
    ]


def _page() -> list[Route]:
    return [
        Route(
            "GET",
            "/",
            probes.page_index,
            "public",
            "static",
            "openai",
            "refusals",
            "the page",
            content_type="text/html",
        ),
        Route(
            "GET",
            "/page/{name:path}",
            probes.page_file,
            "public",
            "static",
            "openai",
            "refusals",
            "files of the page",
            content_type="text/plain",
        ),
    ]


# ---- routes that are declared alike ----


def _with(*names: str) -> dict[str, Any]:
    return {"type": "object", "required": list(names)}


def _generation(
    path: str,
    handler: Handler,
    summary: str,
    body: type[BaseModel],
    answer: dict[str, Any],
    *,
    errors: ErrorStyle = "openai",
) -> Route:
    return Route(
        "POST", path, handler, "inference", "generation", errors, "request", summary, body, answer, streams=True
    )


def _tokenizing(path: str, handler: Handler, summary: str, body: type[BaseModel], answer: dict[str, Any]) -> Route:
    return Route("POST", path, handler, "tokenize", "work", "openai", "access", summary, body, answer)


def _get(path: str, handler: Handler, scope: Scope, limit: LimitClass, summary: str, answer: dict[str, Any]) -> Route:
    return Route("GET", path, handler, scope, limit, "openai", "access", summary, None, answer)


def _health(
    path: str,
    handler: Handler,
    scope: Scope,
    summary: str,
    answer: dict[str, Any] | None = None,
    *,
    content_type: str | None = None,
) -> Route:
    """What monitors ask all day: only refusals have a line in the audit log."""
    return Route(
        "GET", path, handler, scope, "probe", "openai", "refusals", summary, None, answer, content_type=content_type
    )
