"""How tests ask as agents, editors and libraries do, on the surfaces where these ask."""

from __future__ import annotations

import json
from typing import Any

import httpx2

from tests.server.scripts import recorded_prompts
from tests.server.serving import Running

LOOK = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"max_tokens": 2},
    RESPONSES: {"max_output_tokens": 2},
    MESSAGES: {"max_tokens": 2, "model": "alias"},
}


def turns_of(path: str, turns: list[Any]) -> dict[str, Any]:
    """The turns of a conversation under the name that the surface has for them."""
    return {"input" if path == RESPONSES else "messages": turns}


def post(server: Running, path: str, **body: Any) -> httpx2.Response:
    with server.client() as client:
        return client.post(path, json={**BASE.get(path, {}), **body}, timeout=60.0)


def prompt_of(server: Running, path: str, **body: Any) -> str:
    with recorded_prompts(server) as prompts:
        answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text
    return prompts[-1]


def ignored(answer: httpx2.Response) -> set[str]:
    assert answer.status_code == 200, answer.text
    return set(filter(None, answer.headers.get("x-qnext-ignored", "").split(", ")))


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
