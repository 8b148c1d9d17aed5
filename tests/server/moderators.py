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

from qnext.server.moderation.judgement import ModerationQuestion


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
