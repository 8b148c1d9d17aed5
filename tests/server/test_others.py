"""What one key can tell of another's requests: nothing of their content, whatever it looks at.

Legend: L layers, E experts.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from qnext.engine import Engine, SamplingParams
from qnext.server.access.keys import KeyRing, KeyStore
from qnext.server.view import live
from tests.server.serving import Running, load_engine, running_server

VICTIM, ATTACKER, ADMIN = "victim-secret", "attacker-secret", "admin-secret"
LONG = {"prompt": "On and on", "max_tokens": 1500, "ignore_eos": True, "stream": True}
# Ten texts of one length: nothing but what stands in them differs.
CANDIDATES = [
    f"{text:.<48}"
    for text in (
        "The merger closes on Friday",
        "The merger is called off",
        "Fire the head of sales",
        "My test was positive",
        "My test was negative",
        "def main(argv: list):",
        "SELECT name FROM users",
        "Wie geht es dir heute?",
        "1234567890 0987654321",
        "A poem about the sea",
    )
]


@pytest.fixture(scope="module")
def shared(chat_model: Path) -> Iterator[Running]:
    keys = KeyRing(plain=[VICTIM, ATTACKER], admin=[ADMIN])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "BUSY_SECONDS", 0.02)
        patch.setattr(live, "IDLE_SECONDS", 0.2)
        with running_server(chat_model, keys=keys) as running:
            yield running


class Watcher:
    """Reads a live stream in a thread; ticks are without the time of day."""

    def __init__(self, running: Running, secret: str) -> None:
        self.ticks: list[dict[str, Any]] = []
        self._is_done = threading.Event()
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(running, secret), daemon=True)
        self._thread.start()
        assert self._has_begun.wait(10.0)

    def _read(self, running: Running, secret: str) -> None:
        with running.client(secret) as client, client.stream("GET", "/live/stream") as answer:
            for line in answer.iter_lines():
                if self._is_done.is_set():
                    return
                if line.startswith("data: "):
                    tick = json.loads(line.removeprefix("data: "))
                    del tick["time"]
                    self.ticks.append(tick)
                    self._has_begun.set()

    def close(self) -> None:
        self._is_done.set()
        self._thread.join()


def counts_of(engine: Engine, ids: list[int]) -> np.ndarray:
    """[L, E]: tokens of each expert, as anybody finds who has the same model."""
    before = engine.expert_counts()
    engine.add_request(ids, SamplingParams(max_tokens=1), salt=f"{time.perf_counter_ns()}")
    while engine.has_unfinished:
        engine.step()
    after = engine.expert_counts()
    assert before is not None and after is not None
    return np.asarray(after.total_LE - before.total_LE)


def seen_counts(ticks: list[dict[str, Any]]) -> np.ndarray | None:
    """[L, E] in any scale, of ticks that tell of experts."""
    layers = [tick["experts"]["layers"] for tick in ticks if tick.get("experts") and tick["experts"]["steps"]]
    decoded = [[np.frombuffer(base64.b64decode(one["now"]), np.uint8).astype(float) for one in tick] for tick in layers]
    return np.sum(decoded, axis=0) if decoded else None


def guess(seen_LE: np.ndarray | None, known: list[np.ndarray]) -> int:
    """The candidate whose counts are nearest, each layer to the same scale; the first where nothing is seen."""
    if seen_LE is None:
        return 0

    def scaled(counts_LE: np.ndarray) -> np.ndarray:
        return np.asarray(counts_LE / np.maximum(counts_LE.max(axis=1, keepdims=True), 1))

    return int(np.argmin([np.abs(scaled(seen_LE) - scaled(one)).sum() for one in known]))


def attack(running: Running, folder: Path, secret: str) -> tuple[int, list[dict[str, Any]]]:
    """How many of 30 prompts of the victim whoever has this key names, and all ticks it saw."""
    engine, served = load_engine(folder)
    known = [counts_of(engine, served.tokenizer.encode(text)) for text in CANDIDATES]
    right, ticks = 0, []
    watcher = Watcher(running, secret)
    try:
        time.sleep(0.1)
        with running.client(VICTIM) as victim:
            for trial in range(30):
                number = trial * 7 % 10
                start = len(watcher.ticks)
                body = {"prompt": CANDIDATES[number], "max_tokens": 1, "cache_salt": f"{secret} {trial}"}
                assert victim.post("/v1/completions", json=body).status_code == 200
                time.sleep(0.06)
                right += guess(seen_counts(watcher.ticks[start:]), known) == number
            ticks = list(watcher.ticks)
    finally:
        watcher.close()
    return right, ticks


def test_counts_of_experts_name_a_prompt_and_only_administrators_see_them(shared: Running, chat_model: Path) -> None:
    """The attack finds what an administrator may know, and with another key it has nothing to go by."""
    right, ticks = attack(shared, chat_model, ADMIN)
    assert right >= 28 and ticks[0]["view"] == "all"
    right, ticks = attack(shared, chat_model, ATTACKER)
    assert right == 3, "as often as by chance"
    assert len(ticks) >= 2 and all(tick == ticks[0] for tick in ticks)
    assert ticks[0] == {
        "view": "own",
        "rates": {"output_tokens_per_second": 0.0, "prompt_tokens_per_second": 0.0},
        "requests": {"running": 0, "waiting": 0},
        "prefix": {"prompt_tokens_cached": 0, "prompt_tokens_computed": 0},
        "drafts": {"drafted": 0, "accepted": 0},
        "output_tokens": 0,
        "states": [],
    }


def test_nothing_else_that_a_key_may_read_changes_with_others_requests(shared: Running) -> None:
    """Every route that a default key may read without a body answers the same before, while and after others work."""
    paths = (
        "/live/model",
        "/v1/models",
        "/v1/models/alias",
        "/tokenizer_info",
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/openapi.json",
    )

    def look(attacker: httpx2.Client) -> list[Any]:
        answers = [attacker.get(path) for path in paths]
        passing = ("date", "x-request-id")
        return [
            (a.status_code, a.content, {name: value for name, value in a.headers.items() if name not in passing})
            for a in answers
        ]

    with shared.client(ATTACKER) as attacker, shared.client(VICTIM) as victim:
        for path in ("/metrics",):
            assert attacker.get(path).status_code == 403
        assert json.loads(attacker.get("/live/model").content)["view"] == "own"
        before = look(attacker)
        with victim.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()  # kept: a stream closes with its reader
            next(lines)
            assert look(attacker) == before
            assert shared.gauges().num_running == 1
        victim.post("/tokenize", json={"prompt": CANDIDATES[0]})
        assert look(attacker) == before


def test_a_key_sees_its_own_requests(shared: Running) -> None:
    """Under the id that it gave them, even where another's has the same."""
    watcher = Watcher(shared, ATTACKER)
    try:
        with shared.client(VICTIM) as victim, shared.client(ATTACKER) as own:
            headers = {"X-Request-Id": "same"}
            with (
                victim.stream("POST", "/v1/completions", json=LONG, headers=headers) as theirs,
                own.stream("POST", "/v1/completions", json=LONG | {"prompt": "Mine"}, headers=headers) as mine,
            ):
                lines = [theirs.iter_lines(), mine.iter_lines()]  # kept: a stream closes with its reader
                for one in lines:
                    next(one)
                end = time.monotonic() + 10.0
                while not any(tick["output_tokens"] > 3 for tick in watcher.ticks) and time.monotonic() < end:
                    time.sleep(0.02)
    finally:
        watcher.close()
    assert {len(tick["states"]) for tick in watcher.ticks} <= {0, 1}
    states = [tick["states"][0] for tick in watcher.ticks if tick["states"]]
    assert {state["prompt_tokens"] for state in states} == {len("Mine")} and states[-1]["output_tokens"] > 3
    assert {(state["request_id"], state["route"]) for state in states} == {("same", "/v1/completions")}
    assert {state["phase"] for state in states} <= {"queue", "prompt", "answer", "done"}
    assert all(tick["requests"]["running"] + tick["requests"]["waiting"] <= 1 for tick in watcher.ticks)


def test_one_key_s_viewers_leave_room_for_others(shared: Running) -> None:
    watchers = [Watcher(shared, ATTACKER) for _ in range(live.MAX_VIEWERS_PER_KEY)]
    try:
        with shared.client(ATTACKER) as again:
            assert again.get("/live/stream").status_code == 503
        for secret in (VICTIM, ADMIN):
            Watcher(shared, secret).close()
    finally:
        for watcher in watchers:
            watcher.close()


def cached(running: Running, secret: str, **more: Any) -> int:
    body = {"prompt": "A secret that is long enough to fill several blocks of a cache " * 20, "max_tokens": 1, **more}
    with running.client(secret) as client:
        return int(client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_no_prefix_of_another_key_is_found_in_any_memory(chat_model: Path, tmp_path: Path) -> None:
    """In the device's, and on disk after a restart; also by whoever knows the other's salt."""
    options = {"num_blocks": 512, "disk_cache": tmp_path / "disk"}
    for attacker, is_restarted in ((ATTACKER, False), ("another-attacker", True)):
        keys = KeyRing(plain=[VICTIM, attacker], admin=[ADMIN])
        salts: list[dict[str, Any]] = [{}, {"cache_salt": "mine"}, {"cache_salt": keys.cache_salt(keys.find(VICTIM))}]
        with running_server(chat_model, keys=keys, engine_options=options) as running:
            if not is_restarted:
                for more in salts[:2]:
                    cached(running, VICTIM, **more)
            for more in salts:
                assert cached(running, attacker, **more) == 0, more
            for more in salts[:2]:
                assert cached(running, VICTIM, **more) > 0, more


def test_the_only_key_of_a_server_sees_everything(chat_model: Path, tmp_path: Path) -> None:
    """There is nobody else; a second key ends that."""
    store = KeyStore(tmp_path / "keys.json")
    _, secret = store.create("only")
    ring = KeyRing(tmp_path / "keys.json")
    with running_server(chat_model, keys=ring) as running, running.client(secret) as client:
        assert client.get("/live/model").json()["view"] == "all"
        assert client.get("/metrics").status_code == 403, "the file says what its keys may"
        store.create("second")
        assert running.call(ring.reload) is None
        assert client.get("/live/model").json()["view"] == "own"
    with running_server(chat_model, keys=KeyRing(plain=["only"])) as running, running.client("only") as client:
        assert client.get("/live/model").json()["view"] == "all" and client.get("/metrics").status_code == 200
