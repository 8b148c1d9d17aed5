"""A server that looks to the page like the real one: scripted answers, the same headers."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.server.page.answers import chunks_for, events

PAGE = Path(__file__).parents[3] / "qnext" / "server" / "view" / "page"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MAX_MODEL_LEN = 4096


@dataclass
class Script:
    """What the mock says, and what it was asked. Tests change it while the server runs."""

    num_layers: int = 8
    num_experts: int = 64
    top_k: int = 6
    has_chat: bool = True
    has_mtp: bool = True
    streams_experts: bool = False
    alerts: dict[int, list[str]] | None = None  # of layers, by the watch; None: nobody watches
    name: str = "qwen3-next-mock"
    key: str = ""
    pause: float = 0.0  # seconds between the events of an answer
    lit: dict[int, list[int]] | None = None  # experts by layer that ticks name; None: random ones while it answers
    always_busy: bool = False
    view: str = "all"  # or "own": the key sees its own requests
    requests: list[dict[str, Any]] = field(default_factory=list)
    num_cancelled: int = 0
    num_viewers: int = 0
    failures: int = 0  # requests that "busy" still refuses
    num_running: int = 0


def make_app(script: Script) -> Starlette:
    live = LiveMock(script)

    def refused(request: Request) -> Response | None:
        if not script.key or request.headers.get("authorization") == f"Bearer {script.key}":
            return None
        return failure(401, "Incorrect API key provided.")

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        path = PAGE / name
        if path.parent != PAGE or path.suffix not in TYPES or not path.exists():
            return Response(status_code=404, headers=HEADERS)
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)

    async def model(request: Request) -> Response:
        return refused(request) or JSONResponse(live.document(), headers=HEADERS)

    async def ticks(request: Request) -> Response:
        return refused(request) or StreamingResponse(live.stream(), media_type="text/event-stream", headers=HEADERS)

    async def chat(request: Request) -> Response:
        if (wrong := refused(request)) is not None:
            return wrong
        body = await request.json()
        script.requests.append({"path": request.url.path, **body})
        message = body["messages"][-1] if "messages" in body else {"role": "user", "content": body["prompt"]}
        if script.failures:
            script.failures -= 1
            return failure(503, "The queue is full.", {"Retry-After": "7"})
        if message["content"].startswith("limited"):
            return failure(429, "This key may ask 10 times a minute.", {"Retry-After": "12"})
        return StreamingResponse(
            answer(script, message, is_chat="messages" in body), media_type="text/event-stream", headers=HEADERS
        )

    routes = [
        Route("/", page),
        Route("/page/{name}", page),
        Route("/live/model", model),
        Route("/live/stream", ticks),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", chat, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return JSONResponse(body, status, headers={**HEADERS, **(headers or {})})


async def answer(script: Script, message: dict[str, Any], *, is_chat: bool) -> AsyncIterator[bytes]:
    script.num_running += 1
    text = message["content"]
    try:
        if text.startswith("slow"):
            yield b'data: {"choices": [{"delta": {"content": "Slowly"}}]}\n\n'
            while True:
                await asyncio.sleep(0.03)
                yield b'data: {"choices": [{"delta": {"content": " on"}}]}\n\n'
        chunks = chunks_for(message)
        if not is_chat:
            chunks = [{"choices": [{"text": " and so it went on.", "finish_reason": None}]}]
        if text.startswith(("break", "cut")):
            chunks = chunks[:2]
        for event in pieces(events(chunks)):
            yield event
            await asyncio.sleep(script.pause)
        if text.startswith("break"):
            yield b'data: {"error": {"message": "The engine failed at this step.", "type": "server_error"}}\n\n'
        if text.startswith(("break", "cut")):
            return
        reason = "tool_calls" if text.startswith("tool") and message["role"] == "user" else "stop"
        details = {"prompt_tokens_details": {"cached_tokens": 128}}
        usage = {"prompt_tokens": 1000, "completion_tokens": 24, "total_tokens": 1024, **details}
        timings = {"tokens_per_second": 31.5, "cached_tokens": 128, "drafted": 20, "accepted": 15}
        last = {"choices": [{"delta": {}, "text": "", "finish_reason": reason}]}
        yield f"data: {json.dumps(last)}\n\n".encode()
        yield f"data: {json.dumps({'choices': [], 'usage': usage, 'timings': timings})}\n\n".encode()
        yield b"data: [DONE]\n\n"
    except asyncio.CancelledError:
        script.num_cancelled += 1
        raise
    finally:
        script.num_running -= 1


def pieces(events: list[str]) -> Iterator[bytes]:
    """The bytes of the events, cut where no event ends, also inside of characters."""
    waiting = b""
    for number, event in enumerate(events):
        waiting += event.encode()
        cut = len(waiting) - (number % 4)
        yield waiting[:cut]
        waiting = waiting[cut:]
    if waiting:
        yield waiting


class LiveMock:
    """Ticks of a model that does not exist."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.random = np.random.default_rng(7)
        self.step = 0
        self.drafted = 0
        self.accepted = 0
        self.load_LE: np.ndarray | None = None

    def document(self) -> dict[str, Any]:
        script = self.script
        layers = [
            {
                "index": i,
                "kind": "attention" if i % 4 == 3 else "delta",
                "experts": script.num_experts,
                "top_k": script.top_k,
            }
            for i in range(script.num_layers)
        ]
        return {
            "model": script.name,
            "view": script.view,
            "layers": layers,
            "mtp": script.has_mtp,
            "streams_experts": script.streams_experts,
            "max_model_len": MAX_MODEL_LEN,
            "limits": {},
            "sampling": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
            "has_chat": script.has_chat,
            "thinking": False,
        }

    async def stream(self) -> AsyncIterator[bytes]:
        self.script.num_viewers += 1
        try:
            while True:
                yield f"data: {json.dumps(self.tick())}\n\n".encode()
                await asyncio.sleep(0.2)
        finally:
            self.script.num_viewers -= 1

    def tick(self) -> dict[str, Any]:
        script = self.script
        is_busy = script.num_running > 0 or script.always_busy or bool(script.lit)
        self.step += 5 if is_busy else 0
        wave = 0.5 + 0.5 * math.sin(self.step / 60)
        if is_busy:
            self.drafted += 10
            self.accepted += 6 + int(self.random.integers(0, 4))
        if script.view == "own":
            return self.own_tick(is_busy)
        return {
            "view": "all",
            "step": self.step,
            "time": time.time(),
            "rates": {
                "output_tokens_per_second": 22 + 9 * wave + float(self.random.normal()) if is_busy else 0.0,
                "prompt_tokens_per_second": 180 * wave if is_busy else 0.0,
            },
            "requests": {"running": 2 if is_busy else 0, "waiting": 1 if is_busy else 0},
            "blocks": {"used": 700 + int(400 * wave), "total": 2048, "cached": 512},
            "slots": {"used": 7, "total": 16, "running": 2 if is_busy else 0, "cached": 5},
            "prefix": {"prompt_tokens_cached": 51_200, "prompt_tokens_computed": 31_744},
            "drafts": {"drafted": self.drafted, "accepted": self.accepted},
            "experts": {"steps": 5, "layers": self.layers(is_busy)},
            "expert_reads": self.expert_reads(is_busy) if script.streams_experts else None,
            "expert_watch": None if script.alerts is None else self.expert_watch(script.alerts),
            "inside": self.inside() if is_busy else None,
        }

    def expert_watch(self, alerts: dict[int, list[str]]) -> dict[str, Any]:
        values = {"skew": 9.24, "dead": 0.0, "collapse": 0.031, "drift": 0.314}
        layers = [
            {"layer": layer, "alerts": alerts.get(layer, []), **values} for layer in range(self.script.num_layers)
        ]
        return {"tokens": 4096, "thresholds": {"skew": 8.0, "drift": 0.1}, "layers": layers}

    def inside(self) -> dict[str, Any]:
        """Half-lives that double from head to head, and a gate that opens from layer to layer."""
        layers = []
        for layer in self.document()["layers"]:
            lives = [2.0**head for head in range(8)] if layer["kind"] == "delta" else []
            layers.append({"layer": layer["index"], "half_life": lives, "gate": layer["index"] / 100})
        return {"rows": 2, "layers": layers}

    def expert_reads(self, is_busy: bool) -> dict[str, float | None]:
        if not is_busy:
            return {"hit_ratio": None, "bytes_per_token": None, "wait_ratio": 0.0}
        return {"hit_ratio": 0.714, "bytes_per_token": 151_230_000.0, "wait_ratio": 0.43}

    def own_tick(self, is_busy: bool) -> dict[str, Any]:
        state = {"request_id": "req-mine", "route": "/v1/chat/completions", "phase": "answer", "prompt_tokens": 40}
        return {
            "view": "own",
            "time": time.time(),
            "rates": {"output_tokens_per_second": 9.0 if is_busy else 0.0, "prompt_tokens_per_second": 0.0},
            "requests": {"running": int(is_busy), "waiting": 0},
            "prefix": {"prompt_tokens_cached": 16, "prompt_tokens_computed": 24},
            "drafts": {"drafted": self.drafted, "accepted": self.accepted},
            "output_tokens": 7,
            "states": [{**state, "cached_tokens": 16, "output_tokens": 7}] if is_busy else [],
        }

    def layers(self, is_busy: bool) -> list[dict[str, Any]]:
        script = self.script
        if not script.num_experts:
            return []
        shape = (script.num_layers, script.num_experts)
        if self.load_LE is None or self.load_LE.shape != shape:
            order_LE = np.argsort(self.random.random(shape), axis=1)
            self.load_LE = 1.0 / (1.0 + order_LE) ** 0.45
            self.load_LE[order_LE > 0.985 * script.num_experts] = 0
        share_LE = self.load_LE / self.load_LE.sum(axis=1, keepdims=True)
        return [self.layer(i, share_LE[i], is_busy) for i in range(script.num_layers)]

    def layer(self, index: int, share_E: np.ndarray, is_busy: bool) -> dict[str, Any]:
        script = self.script
        now_E = np.zeros(script.num_experts)
        if script.lit is not None:
            now_E[script.lit.get(index, [])] = 255
        elif is_busy:
            chosen = self.random.choice(script.num_experts, size=script.top_k * 5, p=share_E)
            np.add.at(now_E, chosen, 1)
            now_E *= 255 / now_E.max()
        hot = np.argsort(-share_E)[:5]
        used = share_E[share_E > 0]
        return {
            "layer": index,
            "now": encoded(now_E),
            "load": encoded(share_E * 255 / share_E.max()),
            "entropy": float(-(used * np.log(used)).sum() / math.log(script.num_experts)),
            "dead": int((share_E == 0).sum()),
            "hot": [[int(expert), float(share_E[expert])] for expert in hot],
        }


def encoded(values_E: np.ndarray) -> str:
    return base64.b64encode(values_E.astype(np.uint8).tobytes()).decode()


@contextmanager
def serve(script: Script) -> Iterator[str]:
    """The address of a running mock."""
    config = uvicorn.Config(
        make_app(script), port=0, http="h11", log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the mock did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
