"""Two replicas under Ray Serve on this machine: the same answers, affinity, a killed replica, and draining."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not here")

from tests.replicas.cluster import ROUTER_RESOURCE, Cluster, cluster, free_port
from tests.server.serving import save_served

pytestmark = pytest.mark.slow
KEY = "the-key"
CONTEXT = 16_384
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


@pytest.fixture(scope="module")
def own_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, own_port: int) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("replicas")
    flags = folder / "serve.yaml"
    own = f"  port: {own_port}\n  open-readiness: true\n  served-model-name: [q]\n  audit-log: {folder}/audit.jsonl\n"
    flags.write_text(f"serve:\n  api-key: [{KEY}]\n{own}")
    tiny = str(save_served(folder / "tiny", context=CONTEXT))
    return {"model": tiny, "config": str(flags), "cpus": 0.5, "router_resource": ROUTER_RESOURCE}


@pytest.fixture(scope="module")
def running(arguments: dict[str, Any]) -> Iterator[Cluster]:
    with cluster() as found:
        found.deploy(**arguments, replicas=2)
        yield found


def body_of(path: str, text: str, num_tokens: int, **more: Any) -> dict[str, Any]:
    body = {"model": "q", "temperature": 0, "ignore_eos": True, **more}
    if path == COMPLETIONS:
        return {**body, "prompt": text, "max_tokens": num_tokens}
    if path == RESPONSES:
        return {**body, "input": text, "max_output_tokens": num_tokens}
    return {**body, "messages": [{"role": "user", "content": text}], "max_tokens": num_tokens}


@dataclass
class Told:
    """What a client was told."""

    path: str
    status: int
    replica: str | None
    headers: dict[str, str]
    events: list[dict[str, Any]]
    last: str = ""

    @property
    def error(self) -> dict[str, Any] | None:
        if self.status != 200:
            found: dict[str, Any] = self.events[0]["error"]
            return found
        for event in self.events:
            if event.get("error") or event.get("type") == "error":
                return event.get("error") or event
        return None


def ask(running: Cluster, path: str, body: dict[str, Any], begun: Any = None, url: str | None = None) -> Told:
    """The whole answer; of a stream all events. `begun` is called after the first bytes."""
    with running.client(KEY, url=url) as client, client.stream("POST", path, json=body) as reply:
        told = Told(path, reply.status_code, reply.headers.get("x-qnext-replica"), dict(reply.headers), [])
        lines = []
        for line in reply.iter_lines():
            if begun is not None and line:
                begun, _ = None, begun()
            lines.append(line)
    if not reply.headers["content-type"].startswith("text/event-stream"):
        told.events.append(json.loads("".join(lines)))
        return told
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    told.last = data[-1]
    told.events += [json.loads(text) for text in data if text != "[DONE]"]
    return told


def test_the_own_address_answers_as_the_proxy_does(running: Cluster, own_port: int) -> None:
    own = f"http://127.0.0.1:{own_port}"
    for path in (CHAT, MESSAGES, RESPONSES, COMPLETIONS):
        there = ask(running, path, body_of(path, "hello", 12, stream=True))
        here = ask(running, path, body_of(path, "hello", 12, stream=True), url=own)
        assert here.status == 200 and len(here.events) == len(there.events) and here.replica is not None
    with running.client(url=own) as client:
        refused = client.post(CHAT, json={}, headers={"x-request-id": "abc"})
    assert refused.status_code == 401 and refused.headers.get_list("x-request-id") == ["abc"]
    with running.client(url=own) as client:
        ready = client.get("/health/ready")
    assert ready.status_code == 200, "as a kubelet asks, without a key"
    with socket.create_connection(("127.0.0.1", own_port)) as one:
        one.sendall(b"no HTTP at all\r\n\r\n")
        assert one.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_streams_and_whole_answers_are_the_same(running: Cluster) -> None:
    whole = ask(running, CHAT, body_of(CHAT, "hello", 24)).events[0]["choices"][0]["message"]["content"]
    stream = ask(running, CHAT, body_of(CHAT, "hello", 24, stream=True))
    assert stream.last == "[DONE]" and stream.headers["content-type"] == "text/event-stream; charset=utf-8"
    parts = [choice["delta"].get("content", "") for event in stream.events for choice in event["choices"]]
    assert "".join(parts) == whole != ""
    other = ask(running, MESSAGES, body_of(MESSAGES, "hello", 24, stream=True))
    texts = [event["delta"].get("text", "") for event in other.events if event["type"] == "content_block_delta"]
    assert "".join(texts) == whole


def test_keys_count_in_front_of_replicas_too(running: Cluster) -> None:
    for key, status in ((None, 401), ("wrong", 401), (KEY, 200)):
        with running.client(key) as client:
            assert client.post(CHAT, json=body_of(CHAT, "hello", 2)).status_code == status
            assert client.get("/v1/models").status_code == status
    with running.client(KEY) as client:
        counted = client.get("/metrics").text
        reply = client.post(CHAT, json={}, headers={"x-request-id": "abc"})
    assert len({line.split('replica="')[1][:8] for line in counted.splitlines() if 'replica="' in line}) == 2
    assert reply.status_code == 400 and reply.headers.get_list("x-request-id") == ["abc"]


def test_turns_reach_the_replica_that_holds_their_conversation(running: Cluster) -> None:
    def converse(number: int) -> tuple[list[str | None], list[int]]:
        draw = random.Random(number)
        messages = [{"role": "user", "content": f"{number} " + "".join(draw.choices("abcdef ", k=300))}]
        homes, cached = [], []
        for _ in range(4):
            told = ask(running, CHAT, {**body_of(CHAT, "", 16), "messages": messages})
            (answer,) = told.events
            homes.append(told.replica)
            cached.append((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0))
            messages = [
                *messages,
                answer["choices"][0]["message"],
                {"role": "user", "content": draw.choice("abc") * 40},
            ]
        return homes, cached

    with ThreadPoolExecutor(3) as threads:
        conversations = list(threads.map(converse, range(10)))
    later = [home == homes[0] for homes, _ in conversations for home in homes[1:]]
    assert sum(later) >= 0.95 * len(later)
    assert {homes[0] for homes, _ in conversations} == {home for homes, _ in conversations for home in homes}
    assert len({homes[0] for homes, _ in conversations}) == 2
    # And the model's own cache knows them.
    assert sum(count >= 256 for _, counts in conversations for count in counts[1:]) >= 0.95 * len(later)


def test_scaling_down_loses_no_answer(running: Cluster, arguments: dict[str, Any]) -> None:
    with ThreadPoolExecutor(8) as threads:
        streams = [
            threads.submit(ask, running, CHAT, body_of(CHAT, f"{number}", 4_000, stream=True)) for number in range(6)
        ]
        running.deploy(**arguments, replicas=1)
        told = [stream.result() for stream in streams]
    assert [one.error for one in told] == 6 * [None] and {one.last for one in told} == {"[DONE]"}
    assert len({one.replica for one in told}) == 2
    assert len(running.replicas()) == 1
    running.deploy(**arguments, replicas=2)


def test_a_killed_replica_loses_only_its_running_requests(running: Cluster) -> None:
    """The others go on, and all later requests are answered."""
    victim = running.replicas()[0]
    kinds = [(path, stream) for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES) for stream in (True, False)]
    begun: set[int] = set()

    def run(number: int) -> Told:
        path, stream = kinds[number % len(kinds)]
        return ask(running, path, body_of(path, f"{number}", 6_000, stream=stream), lambda: begun.add(number))

    with ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(run, number) for number in range(16)]
        while not all(n in begun or one.done() for n, one in enumerate(asked) if n % 2 == 0):  # the streams
            time.sleep(0.001)
        running_then = [one for one in asked if not one.done()]  # the others have found an end of their text by then
        victim.kill()
        told = [one.result() for one in running_then]
        after = list(threads.map(lambda n: ask(running, CHAT, body_of(CHAT, f"after {n}", 4)), range(8)))
    lost = [one for one in told if one.error is not None]
    streams = [one for one in lost if one.status == 200]
    # Streams name their replica: all of the dead one are lost, and none of the other.
    dead = {one.replica for one in streams}
    assert len(dead) == 1
    assert [one for one in told if one.status == 200 and one.replica in dead] == streams
    assert 0 < len(lost) < len(told)
    for one in lost:
        if one.status != 200:
            assert one.status == 503 and int(one.headers["retry-after"]) >= 1
        elif one.path in (CHAT, COMPLETIONS):
            assert one.last == "[DONE]"
    assert [one.status for one in after] == 8 * [200]
    assert Counter(one.replica in dead for one in after) == {False: 8}


def test_each_replica_has_its_own_audit_log(running: Cluster, arguments: dict[str, Any]) -> None:
    names = {path.name for path in Path(arguments["config"]).parent.glob("audit*")}
    assert names == {"audit-replica-0.jsonl", "audit-replica-1.jsonl"}
