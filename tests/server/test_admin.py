"""What administrators see and do on their own listener, and what monitors read."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qnext.server.access.keys import KeyRing
from tests.server.serving import Running, running_server

ADMIN = {"Authorization": "Bearer admin-secret"}
USER = {"Authorization": "Bearer user-secret"}
LONG = {"prompt": "On and on", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@pytest.fixture
def kept(chat_model: Path) -> Iterator[Running]:
    keys = KeyRing(plain=["user-secret"], admin=["admin-secret"])
    with running_server(chat_model, keys=keys) as running:
        yield running


def metric(kept: Running, name: str) -> float:
    text = httpx2.get(f"{kept.url}/metrics", headers=ADMIN).text
    return sum(s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name)


def test_a_running_request_is_seen_and_ended(kept: Running) -> None:
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx2.stream(
            "POST", f"{kept.url}/v1/completions", json=LONG, headers={**USER, "X-Request-Id": "the-one"}, timeout=60.0
        ) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert begun.wait(20.0)
    status = httpx2.get(f"{kept.admin_url}/admin/status", headers=ADMIN).json()
    (request,) = status["requests"]
    assert status["state"] == "ready" and status["engine"]["num_running"] == 1
    assert request["request_id"] == "the-one" and request["route"] == "/v1/completions" and request["stream"]
    assert "On and on" not in json.dumps(status)
    ended = httpx2.post(f"{kept.admin_url}/admin/requests/the-one/abort", headers=ADMIN)
    assert ended.json() == {"aborted": True}
    reader.join(10.0)
    assert not reader.is_alive()
    last = [line for line in lines if line][-2:]
    assert (
        json.loads(last[0].removeprefix("data: "))["error"]["code"] == "aborted_by_admin" and last[1] == "data: [DONE]"
    )
    again = httpx2.post(f"{kept.admin_url}/admin/requests/the-one/abort", headers=ADMIN)
    assert again.status_code == 404
    end = time.monotonic() + 10.0  # the client hears of the end before the engine has let go
    while kept.gauges().num_running and time.monotonic() < end:
        time.sleep(0.01)
    assert kept.gauges().num_running == 0


def test_experts_are_counted_for_administrators_the_page_and_monitors(kept: Running) -> None:
    body = {"prompt": "Count me", "max_tokens": 8, "temperature": 0}
    assert httpx2.post(f"{kept.url}/v1/completions", json=body, headers=USER).status_code == 200
    load = httpx2.get(f"{kept.admin_url}/admin/experts", headers=ADMIN).json()
    engine = kept.server.worker.engine
    expected = engine.expert_load(64)
    assert expected is not None
    assert [layer["tokens"] for layer in load["layers"]] == [list(layer.tokens) for layer in expected.layers]
    assert sum(load["layers"][0]["tokens"]) == 2 * engine.metrics.step_tokens.sum, "two experts for every token"
    assert metric(kept, "qnext_generation_tokens_total") == 8
    with httpx2.stream("GET", f"{kept.url}/live/stream", headers=ADMIN) as stream:
        tick = json.loads(next(line for line in stream.iter_lines() if line).removeprefix("data: "))
    assert tick["step"] == load["num_steps"] and len(tick["experts"]["layers"]) == len(load["layers"])
    document = httpx2.get(f"{kept.url}/live/model", headers=ADMIN).json()
    assert document["max_model_len"] == engine.max_model_len and document["limits"]["max_n"] == 16
    assert np.isfinite(tick["experts"]["layers"][0]["entropy"])


def test_keys_are_read_again_or_left_as_they_are(chat_model: Path, tmp_path: Path) -> None:
    from qnext.server.access.keys import KeyStore

    store = KeyStore(tmp_path / "keys.json")
    _, admin = store.create("admin", scopes=frozenset({"admin"}))
    with running_server(chat_model, keys=KeyRing(store.path)) as running:
        reload = f"{running.admin_url}/admin/keys/reload"
        headers = {"x-api-key": admin}
        _, user = store.create("user")
        assert httpx2.get(f"{running.url}/v1/models", headers={"x-api-key": user}).status_code == 401
        assert httpx2.post(reload, headers=headers).json() == {"keys": 2}
        assert httpx2.get(f"{running.url}/v1/models", headers={"x-api-key": user}).status_code == 200
        store.path.write_text("{", encoding="utf-8")
        refused = httpx2.post(reload, headers=headers)
        assert refused.status_code == 409 and str(tmp_path) not in refused.text
        assert httpx2.get(f"{running.url}/v1/models", headers={"x-api-key": user}).status_code == 200


def test_drain_is_as_sigterm(kept: Running) -> None:
    assert httpx2.post(f"{kept.admin_url}/admin/drain", headers=ADMIN).json() == {"state": "draining"}
    with contextlib.suppress(httpx2.ConnectError):  # nothing ran: it may have stopped
        assert httpx2.get(f"{kept.url}/health/ready", headers=USER).status_code == 503
