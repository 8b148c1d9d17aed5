"""A replica without Ray's processes: its answers are those of the server's routes. And the router without replicas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not here")

from qnext.replicas import replica as replica_module
from qnext.replicas.call import AnswerHead, RoutedCall
from qnext.replicas.prefixes import chain_of
from qnext.replicas.replica import Replica
from qnext.replicas.router import PrefixRouter
from qnext.server.run import LoadModel
from qnext.server.server import Server
from qnext.session.folder import open_folder
from qnext.session.served import ServeConfig, load_served
from tests.server.serving import save_served

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("replica") / "tiny")


def with_replica(model: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Replica, Server], Awaitable[Any]]) -> Any:
    """What `use` gives of an open replica, which is closed then."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"), rank=SimpleNamespace(rank=0))
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(replica_module, "prepare_process", lambda: None)
    monkeypatch.setattr(replica_module.gc, "freeze", lambda: None)
    names, servers = [], []

    def open_server(name: str) -> tuple[Server, LoadModel]:
        names.append(name)
        servers.append(Server())
        return servers[0], lambda: load_served(open_folder(str(model)), ServeConfig(["q"]))

    async def run() -> Any:
        replica = Replica()
        await replica.open(open_server)
        try:
            return await use(replica, servers[0])
        finally:
            await replica.close()

    found = asyncio.run(run())
    assert names == ["replica-0"]
    return found


def call(path: str, body: dict[str, Any] | None, *, method: str = "POST") -> RoutedCall:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"x-request-id", b"abc")]
    scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path, "raw_path": b""}
    content = b"" if body is None else json.dumps(body).encode()
    return RoutedCall({**scope, "query_string": b"", "headers": headers}, content)


def body(num_tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"messages": messages, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **more}


def test_answers_pass_in_pieces_and_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(replica: Replica, server: Server) -> None:
        name, whole = await replica.whole(call(CHAT, body(16)))
        text = json.loads(whole.body)["choices"][0]["message"]["content"]
        assert name == "r1" and whole.status == 200 and text
        assert dict(whole.headers)[b"x-qnext-replica"] == b"r1" and dict(whole.headers)[b"x-request-id"] == b"abc"
        pieces = [piece async for piece in replica(call(CHAT, body(16, stream=True)))]
        head = pieces[0]
        assert isinstance(head, AnswerHead) and not head.is_whole
        frames = (head.body + b"".join(pieces[1:])).decode().strip().split("\n\n")
        assert frames.pop() == "data: [DONE]"
        events = [json.loads(frame.removeprefix("data: ")) for frame in frames]
        assert "".join(c["delta"].get("content", "") for event in events for c in event["choices"]) == text
        refused = (await replica.whole(call(CHAT, {})))[1]
        assert refused.status == 400 and json.loads(refused.body)["error"]["code"] == "missing_required_parameter"
        assert b"qnext_http_requests_total" in (await replica.whole(call("/metrics", None, method="GET")))[1].body
        await replica.check_health()

    with_replica(model, monkeypatch, use)


def test_a_caller_that_leaves_ends_its_request(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(replica: Replica, server: Server) -> None:
        pieces = replica(call(CHAT, body(1_900, stream=True)))
        await anext(pieces)
        assert len(server.tasks) == 1
        await pieces.aclose()
        assert not server.tasks
        aborted = [
            line for line in server.render_metrics().splitlines() if line.startswith(b"qnext_request_aborted_total{")
        ]
        assert len(aborted) == 1 and aborted[0].endswith(b" 1.0")

    with_replica(model, monkeypatch, use)


def test_a_failed_engine_is_no_healthy_replica(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(replica: Replica, server: Server) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Server, "fault", "the engine has failed")
            with pytest.raises(RuntimeError, match="the engine has failed"):
                await replica.check_health()

    with_replica(model, monkeypatch, use)


def test_the_router_of_ray_serve_ranks_by_what_it_has_routed() -> None:
    router = object.__new__(PrefixRouter)
    router.initialize_state(spread=2)
    loads = {"a": 0, "b": 1}
    router._replica_queue_len_cache = SimpleNamespace(get=lambda name: loads[name.unique_id])
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in loads]

    def pending(text: str) -> Any:
        routed = RoutedCall({}, b"", chain_of("", {"prompt": text}))
        return SimpleNamespace(args=[routed], routing_context=SimpleNamespace(should_backoff=False))

    def order(request: Any) -> str:
        ranks = asyncio.run(router.choose_replicas(replicas, request))
        assert request is None or request.routing_context.should_backoff, "else Ray Serve asks again without a pause"
        return "".join(replica.replica_id.unique_id for (replica,) in ranks)

    assert order(pending("x")) == "ab"
    router.on_request_routed(pending("x"), replicas[1].replica_id, None)
    assert order(pending("x")) == "ba" and order(pending("y")) == "ab" and order(None) == "ab"
    loads["b"] = 3
    assert order(pending("x")) == "ab"
