"""Ray Serve itself with replicas that need no model: affinity and a killed replica. test_ray.py has models and more."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("ray", reason="the extra ray is not here")

from tests.replicas.cluster import Cluster, cluster

MESSAGES = "/v1/messages"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = tmp_path_factory.mktemp("flags") / "serve.yaml"
    flags.write_text("insecure-no-auth: true\n")
    with cluster(application="tests.replicas.parrots") as found:
        found.deploy(model="none", config=str(flags), cpus=0.5, replicas=2)
        yield found


def ask(running: Cluster, texts: list[str], num_events: int, begun: set[int] | None = None) -> tuple[str, str]:
    """The replica, and the text of all events."""
    body = {"messages": [{"role": "user", "content": text} for text in texts], "max_tokens": num_events}
    with running.client() as client, client.stream("POST", MESSAGES, json=body) as reply:
        assert reply.status_code == 200, reply.read()
        lines = []
        for line in reply.iter_lines():
            lines.append(line)
            if begun is not None:
                begun.add(int(texts[0]))
    return reply.headers["x-qnext-replica"], "\n".join(lines)


def test_turns_reach_the_replica_of_their_conversation(running: Cluster) -> None:
    def converse(number: int) -> list[str]:
        texts = [f"{number} {random.Random(number).random()}"]
        homes = []
        for turn in range(5):
            homes.append(ask(running, texts, 2)[0])
            texts += ["an answer", f"question {turn}"]
        return homes

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(converse, range(24)))
    later = [home == homes[0] for homes in found for home in homes[1:]]
    assert sum(later) >= 0.95 * len(later)
    assert len({homes[0] for homes in found}) == 2


def test_a_killed_replica_loses_only_its_running_requests(running: Cluster) -> None:
    begun: set[int] = set()
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, running, [f"{number}"], 100, begun) for number in range(8)]
        while len(begun) < 8:
            assert not any(one.done() for one in asked), "they take two seconds"
            time.sleep(0.005)
        running.replicas()[0].kill()
        told = [one.result() for one in asked]
        after = {name for name, _ in threads.map(lambda number: ask(running, [f"after {number}"], 1), range(8))}
    dead = {name for name, text in told if "event: error" in text}
    assert len(dead) == 1 and not dead & after
    for name, text in told:
        if name in dead:
            assert '"overloaded_error"' in text and "[DONE]" not in text
        else:
            assert text.count("data: {}") == 100 and "[DONE]" in text
    assert {name for name, _ in told} != dead
