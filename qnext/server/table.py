"""All routes of the public listener. What a route may do is declared here and nowhere else."""

from __future__ import annotations

from typing import Any

from qnext.server import models, probes
from qnext.server.anthropic.bodies import CountBody, MessagesBody
from qnext.server.anthropic.messages import count_tokens, messages
from qnext.server.metrics import CONTENT_TYPE
from qnext.server.openai.chat import chat_completions
from qnext.server.openai.chat_bodies import ChatBody
from qnext.server.openai.completions import CompletionBody, completions
from qnext.server.openai.responses import responses
from qnext.server.openai.responses_bodies import ResponseBody
from qnext.server.routes import Route, Scope

_OBJECT: dict[str, Any] = {"type": "object"}


def _with(*names: str) -> dict[str, Any]:
    return {"type": "object", "required": list(names)}


def public_routes(*, with_page: bool = True, open_readiness: bool = False) -> list[Route]:
    """Every route that is served beside the administrators'.

    `open_readiness`: /health/ready asks for no key: the balancers and kubelets that ask carry none.
    """
    readiness: Scope = "public" if open_readiness else "any"
    choices = _with("id", "object", "created", "model", "choices", "usage")
    routes = [
        Route("POST", "/v1/chat/completions", chat_completions, "inference", "generation", "openai", "request",
              "answer a conversation", ChatBody, choices, streams=True),
        Route("POST", "/v1/completions", completions, "inference", "generation", "openai", "request",
              "continue a text", CompletionBody, choices, streams=True),
        Route("POST", "/v1/responses", responses, "inference", "generation", "openai", "request",
              "answer a conversation, in OpenAI's newer form", ResponseBody,
              _with("id", "object", "model", "output", "status", "usage"), streams=True),
        Route("POST", "/v1/messages", messages, "inference", "generation", "anthropic", "request",
              "answer a conversation, in Anthropic's form", MessagesBody,
              _with("id", "type", "role", "content", "stop_reason", "usage"), streams=True),
        Route("POST", "/v1/messages/count_tokens", count_tokens, "inference", "work", "anthropic", "access",
              "how many tokens a conversation has", CountBody, _with("input_tokens")),
        Route("GET", "/v1/models", models.list_models, "inference", "light", "openai", "access",
              "the names of the model", None, _with("object", "data")),
        Route("GET", "/v1/models/{model:path}", models.get_model, "inference", "light", "openai", "access",
              "one name of the model", None, _with("id", "object")),
        Route("POST", "/tokenize", models.tokenize, "tokenize", "work", "openai", "access",
              "text to token ids", models.TokenizeBody, _with("tokens", "count", "max_model_len")),
        Route("POST", "/detokenize", models.detokenize, "tokenize", "work", "openai", "access",
              "token ids to text", models.DetokenizeBody, _with("prompt")),
        Route("GET", "/tokenizer_info", models.tokenizer_info, "tokenize", "light", "openai", "access",
              "what clients need of the tokenizer", None, _with("eos_token")),
        Route("GET", "/health/live", probes.health_live, "public", "probe", "openai", "refusals",
              "whether the server lives", None, _with("status")),
        Route("GET", "/health/ready", probes.health_ready, readiness, "probe", "openai", "refusals",
              "whether it takes requests", None, _with("status")),
        Route("GET", "/health", probes.health, "public", "probe", "openai", "refusals",
              "whether it takes requests, without a word", content_type="text/plain"),
        Route("GET", "/version", models.version, "any", "probe", "openai", "access", "the version", None,
              _with("version")),
        Route("GET", "/metrics", probes.metrics, "metrics", "probe", "openai", "access", "for Prometheus",
              content_type=CONTENT_TYPE.split(";")[0]),
        Route("GET", "/live/model", probes.live_model, "any", "light", "openai", "access",
              "layers and limits, for the page", None, _OBJECT),
        Route("GET", "/live/stream", probes.live_stream, "any", "generation", "openai", "access",
              "the model at work, for the page", content_type="text/event-stream"),
    ]  # fmt: skip
    if with_page:
        routes += [
            Route("GET", "/", probes.page_index, "public", "static", "openai", "refusals", "the page",
                  content_type="text/html"),
            Route("GET", "/page/{name:path}", probes.page_file, "public", "static", "openai", "refusals",
                  "files of the page", content_type="text/plain"),
        ]  # fmt: skip
    routes.append(
        Route("GET", "/openapi.json", probes.openapi_handler(routes), "any", "static", "openai", "access",
              "this document", None, _OBJECT)
    )  # fmt: skip
    return routes
