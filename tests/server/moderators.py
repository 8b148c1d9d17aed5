"""Hooks that operators might write: functions of Python, and an HTTP service."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2

from qnext.server.moderation.judgement import ModerationQuestion
from tests.server.serving import Running


class Script:
    """What a hook replies by the stage of the question, and what it was asked."""

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.asked: list[dict[str, Any]] = []
        self.seconds = 0.0

    def reply(self, question: dict[str, Any]) -> Any:
        self.asked.append(question)
        reply = self.replies.get(question["stage"], "allow")
        return reply(question) if callable(reply) else reply

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [question for question in self.asked if question["stage"] == stage]

    def plain(self, question: ModerationQuestion) -> Any:
        time.sleep(self.seconds)
        return self.reply(question.document())

    async def coroutine(self, question: ModerationQuestion) -> Any:
        await asyncio.sleep(self.seconds)
        return self.reply(question.document())


@contextmanager
def http_service(script: Script, *, key: str | None = None) -> Iterator[str]:
    """An address that replies as the script does; 401 without the key."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(script.seconds)
            is_known = key is None or self.headers["Authorization"] == f"Bearer {key}"
            reply = script.reply(question)
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{service.server_address[1]}/moderate"
    finally:
        service.shutdown()
        service.server_close()


CHAT = {"messages": [{"role": "user", "content": "Say something"}], "temperature": 0, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "max_tokens": 600},
    "/v1/completions": {"prompt": "Say something", "temperature": 0, "max_tokens": 600, "ignore_eos": True},
    "/v1/responses": {"input": "Say something", "temperature": 0, "max_output_tokens": 600},
    "/v1/messages": {
        "model": "alias",
        "messages": [{"role": "user", "content": "Say something"}],
        "temperature": 0,
        "max_tokens": 600,
    },
}


def post(running: Running, path: str, **more: Any) -> httpx2.Response:
    body = {"model": "alias", **BODIES[path], **more}
    return httpx2.post(f"{running.url}{path}", json=body, timeout=120.0)


def events(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(path: str, answer: httpx2.Response) -> str:
    """All text of an answer, thoughts included, streamed or not."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return "".join(delta_of(event) for event in events(answer.text))
    document = answer.json()
    if path == "/v1/chat/completions":
        return str(document["choices"][0]["message"]["content"])
    if path == "/v1/completions":
        return str(document["choices"][0]["text"])
    parts = document["content"] if path == "/v1/messages" else [p for i in document["output"] for p in i["content"]]
    return "".join(part["text"] for part in parts)


def delta_of(event: dict[str, Any]) -> str:
    if "choices" in event:
        choices = event["choices"]
        return "".join(each.get("text") or (each.get("delta") or {}).get("content") or "" for each in choices)
    delta = event.get("delta")
    if isinstance(delta, str):
        return delta if event["type"] == "response.output_text.delta" else ""
    return str((delta or {}).get("text") or "")


def end_of(path: str, answer: httpx2.Response) -> str | None:
    """How an answer says that it has ended."""
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text) if is_stream else [answer.json()]
    for event in found:
        for place in (event, event.get("delta") or {}, *event.get("choices", [])):
            if isinstance(place, dict) and (place.get("finish_reason") or place.get("stop_reason")):
                return str(place.get("finish_reason") or place.get("stop_reason"))
        response = event.get("response", event)
        if response.get("incomplete_details"):
            return str(response["incomplete_details"]["reason"])
    return None
