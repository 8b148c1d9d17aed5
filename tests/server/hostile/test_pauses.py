"""The event loop never stands still for long, whatever comes in, and memory stays bounded.

A pause is what the process is to blame for (see `monitored`). One that is long must be long each time: on a machine
that does other work a thread that holds the interpreter's lock may lose its processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx2
import pytest

from tests.pace import load_factor, slowness
from tests.server.hostile.attacks import ATTACKS, CONTEXT, Attack, Monitored, monitored
from tests.server.hostile.harness import MAX_MEMORY
from tests.server.hostile.monitored import KEYS
from tests.server.serving import save_served

MAX_PAUSE = 0.050  # seconds of a processor, of the machine that `slowness` compares with
TRIES = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    with monitored(save_served(tmp_path_factory.mktemp("served") / "tiny-long", context=CONTEXT)) as running:
        yield running
        assert running.read()["peak"] < MAX_MEMORY


def _check(server: Monitored, attack: Attack) -> None:
    pauses = []
    for _ in range(TRIES):
        server.read()
        statuses = server.send(attack)
        found = server.read()
        assert set(statuses) <= {200, 400, 429}, statuses
        assert found["peak"] < MAX_MEMORY, f"{found['peak'] >> 20} MiB"
        pauses.append(found["pause"])
        if found["pause"] < MAX_PAUSE * slowness():
            return
    raise AssertionError(f"the loop stood still for {min(pauses):.3f} s each time; threads were at {found['places']}")


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.in_short])
def test_the_loop_does_not_stand_still(server: Monitored, name: str) -> None:
    """In short: one at a time; what holds the loop holds it once."""
    _check(server, ATTACKS[name]._replace(times=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_the_loop_does_not_stand_still_in_full(server: Monitored, name: str) -> None:
    _check(server, ATTACKS[name])


@pytest.mark.slow
def test_24_large_texts_of_one_key_delay_only_that_key(server: Monitored) -> None:
    """Another key's texts have their turn at once, and health answers on the clock."""
    attack = ATTACKS["2 MB of code to tokenize"]
    thread = threading.Thread(target=server.send, args=(attack,))
    thread.start()
    time.sleep(0.5)
    times: dict[str, list[float]] = {"health": [], "short": [], "long": []}
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    long = "def f(x): return x\n" * 8_000
    with httpx2.Client(base_url=server.url, headers=headers, timeout=60.0) as client:
        while thread.is_alive() and len(times["long"]) < 10:
            for kind, text in (("health", ""), ("short", "a word"), ("long", long)):
                begin = time.perf_counter()
                answer = client.get("/health") if kind == "health" else client.post("/tokenize", json={"prompt": text})
                times[kind].append(time.perf_counter() - begin)
                assert answer.status_code == 200
        assert thread.is_alive(), "the attack was over before anything was measured"
    thread.join()
    assert sorted(times["health"])[len(times["health"]) // 2] < 0.05 * load_factor()
    assert sorted(times["short"])[len(times["short"]) // 2] < 0.05 * load_factor()
    assert max(times["long"]) < 5.0 * load_factor()
