"""All fields of all routes with odd values, several requests at a time, beside requests that must not notice."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qnext.server.access.audit import AuditLog
from qnext.server.access.keys import KeyRing
from qnext.server.limits import Limits
from tests.server.hostile.conftest import ADMIN, ATTACKER, BYSTANDER
from tests.server.hostile.field_bodies import Attack, attack, body_routes, fields
from tests.server.hostile.harness import Harness, check_error
from tests.server.hostile.surfaces import encoded, surfaces
from tests.server.serving import running_server, save_served

SEED = 13
NUM_THREADS = 4
# Of texts of a body that have to wait for others of their kind: no fault of the server's, and no other status says so.
_BUSY = (429, 503)
_PLACES = re.compile(r"\b(the body|prompt|messages|tools|n|stream|field|constraint|schema|regex|grammar)\b")
VICTIMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "The canary sings", "max_tokens": 9, "temperature": 0, "logprobs": 2}),
    (
        "/v1/completions",
        {
            "prompt": "The canary",
            "max_tokens": 9,
            "temperature": 1.1,
            "seed": 5,
            "top_p": 0.9,
            "logprobs": 1,
            "repetition_penalty": 1.2,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Sing"}],
            "max_tokens": 8,
            "seed": 6,
            "temperature": 0.8,
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
        },
    ),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A server whose context is short, and so are answers that nobody ends."""
    folder = save_served(tmp_path_factory.mktemp("fuzzed") / "tiny-fuzzed", context=1_024)
    audit_path = folder.with_name("audit.jsonl")
    keys = KeyRing(plain=[ATTACKER, BYSTANDER], admin=[ADMIN])
    limits = Limits(drain_seconds=1.0, watchdog_seconds=600.0)
    with running_server(folder, limits=limits, keys=keys, audit=AuditLog(audit_path)) as running:
        harness = Harness(running, ATTACKER, BYSTANDER, audit_path)
        yield harness
        harness.close()


class Victims:
    """Requests of another key over and over, whose answers were taken before."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._wanted = [self._ask(path, body) for path, body in VICTIMS]
        self._is_done = threading.Event()
        self.num_asked = 0

    def run(self) -> None:
        for number in itertools.count():
            if self._is_done.wait(0.05):
                return
            path, body = VICTIMS[number % len(VICTIMS)]
            assert alike(self._ask(path, body), self._wanted[number % len(VICTIMS)]), "another's answer has changed"
            self.num_asked += 1

    def stop(self) -> None:
        self._is_done.set()

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._harness.other.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]


def alike(one: Any, other: Any) -> bool:
    """Equal, but for the last bits of log-probabilities: they differ where the model ran in other batches."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-4)
    return bool(one == other)


def hurl(harness: Harness, number: int, tried: Attack) -> int:
    surface, raw = tried
    where = f"number {number} of seed {SEED} on {surface.name}: {raw[:1_500]!r}"
    headers = {"Content-Type": "application/json"}
    answer = harness.client.post(surface.path, content=raw, headers=headers, timeout=120.0)
    status = answer.status_code
    assert status == 200 or 400 <= status < 500 or (status == 503 and "Retry-After" in answer.headers), (
        f"{where}: {status} {answer.text[:300]}"
    )
    if status == 200:
        assert "internal_error" not in answer.text, f"{where}: {answer.text[-300:]}"
        return status
    check_error(answer.content, surface.style, where)
    error = json.loads(answer.content)["error"]
    message = error["message"]
    assert message.isprintable(), f"{where}: more than a line: {message!r}"
    if status not in _BUSY:
        names = {str(part) for field in fields(surface.name) for part in field.path}
        is_named = error.get("param") or any(word in names for word in re.findall(r"\w+", message))
        assert is_named or _PLACES.search(message), f"{where}: nothing is named: {message}"
    return status


def fuzz(harness: Harness, count: int) -> Counter[int]:
    """Send so many bodies, and look whether anybody else has noticed."""
    harness.running.server.worker.engine.scheduler.check_integrity()
    victims = Victims(harness)
    numbers = iter(range(count))
    lock = threading.Lock()
    statuses: Counter[int] = Counter()
    has_failed = threading.Event()

    def work() -> None:
        try:
            while not has_failed.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                status = hurl(harness, number, attack(SEED, number))
                with lock:
                    statuses[status] += 1
        except BaseException:
            has_failed.set()
            raise

    with ThreadPoolExecutor(NUM_THREADS + 1) as threads:
        watched = threads.submit(victims.run)
        workers = [threads.submit(work) for _ in range(NUM_THREADS)]
        for future in workers:
            future.exception()
        victims.stop()
        for future in (*workers, watched):
            future.result()
    assert victims.num_asked >= 10
    harness.check_idle()
    assert harness.canary() == harness.baseline
    assert harness.running.server.is_ready
    return statuses


def test_four_hundred_bodies(fuzzed: Harness) -> None:
    statuses = fuzz(fuzzed, 400)
    assert statuses[200] > 80 and statuses[400] > 120, f"the bodies are too odd, or not odd enough: {statuses}"


@pytest.mark.slow
def test_twenty_thousand_bodies(fuzzed: Harness) -> None:
    assert sum(fuzz(fuzzed, 20_000).values()) == 20_000


def test_every_route_with_a_body_is_tried_with_every_field() -> None:
    """New routes and fields come by themselves: a route needs a valid body in `surfaces`."""
    known = surfaces()
    assert {route.path for route in body_routes()} == {surface.path for surface in known.values()}
    for name, surface in known.items():
        assert surface.route.body is not None
        top = {field.path[0] for field in fields(name)}
        declared = {info.alias or field for field, info in surface.route.body.model_fields.items()}
        assert declared <= top, name
    assert ("stream_options", "include_usage") in {field.path for field in fields("chat")}
    assert ("messages", 0, "content") in {field.path for field in fields("messages")}


def test_bodies_are_the_same_each_time() -> None:
    assert [attack(1, n).raw for n in range(50)] == [attack(1, n).raw for n in range(50)]
    assert len({attack(1, n).raw for n in range(50)}) > 45
    assert encoded({}) == b"{}"
