"""Replicas by Ray Serve: do turns find their prefixes, what does a killed replica lose, what does the router cost?

MODEL is a folder with a tokenizer. Two replicas serve it on this machine, and one process of `qnext serve` beside them.
Cost: one small request, to the plain server, to the router's own address, through Ray Serve's proxy, and by Ray's own
call of a replica, in turn; then the first event of a stream, the same ways. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from _pair import print_json

import httpx2
import psutil

from qnext.replicas.call import RoutedCall

DEPLOY = Path(__file__).parents[1] / "deploy"
ROUTE = "/v1/completions"
REPLICA = "x-qnext-replica"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def plain_server(model: str, port: int) -> Iterator[str]:
    command = [sys.executable, "-m", "qnext", "serve", model, "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            next(line for line in process.stderr if line.startswith("ready"))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@contextmanager
def replicas(model: str, folder: Path) -> Iterator[tuple[str, str]]:
    """The router's own address and that of Ray Serve's proxy."""
    own, proxy = free_port(), free_port()
    flags = folder / "serve.yaml"
    flags.write_text(f"serve:\n  insecure-no-auth: true\n  port: {own}\n  threads: 1\n")
    # Before Ray starts: its processes look for the application there.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(DEPLOY), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=secrets.token_hex(32))
    sys.path.insert(0, str(DEPLOY))
    import ray
    from ray import serve
    from ray_serve import app

    ray.init(num_cpus=4, include_dashboard=False, _temp_dir=str(folder), log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": proxy}, logging_config={"log_level": "WARNING"})
        serve.run(app({"model": model, "config": str(flags), "replicas": 2, "cpus": 0.5}), name="qnext")
        yield f"http://127.0.0.1:{own}", f"http://127.0.0.1:{proxy}"
        serve.shutdown()
    finally:
        ray.shutdown()


def prompt(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(200), k=count)


def affinity(url: str, *, conversations: int, turns: int) -> dict[str, Any]:
    """Conversations side by side: the share of later turns that reach the replica of the turn before."""

    def converse(number: int) -> tuple[list[str], list[int]]:
        ids, homes, cached = prompt(number, 400), [], []
        with httpx2.Client(base_url=url, timeout=300.0) as client:
            for turn in range(turns):
                reply = client.post(ROUTE, json={"prompt": ids, "max_tokens": 8, "ignore_eos": True})
                homes.append(reply.raise_for_status().headers[REPLICA])
                cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
                ids = [*ids, *prompt(1_000 * number + turn, 40)]
        return homes, cached

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(converse, range(conversations)))
    moved = [(a == b) for homes, _ in found for a, b in pairwise(homes)]
    hits = [count >= 256 for _, counts in found for count in counts[1:]]
    homes = [homes[0] for homes, _ in found]
    return {
        "later_turns": len(moved),
        "same_replica": sum(moved) / len(moved),
        "found_their_prefix": sum(hits) / len(hits),
        "conversations_by_replica": sorted(homes.count(name) for name in set(homes)),
    }


def killed(url: str, *, streams: int, tokens: int) -> dict[str, Any]:
    """kill -9 of one replica while both write answers: what is lost, and how long until all is answered again."""
    begun: set[int] = set()

    def stream(number: int) -> tuple[str, bool]:
        body = {"prompt": prompt(number, 50), "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with (
            httpx2.Client(base_url=url, timeout=300.0) as client,
            client.stream("POST", ROUTE, json=body) as reply,
        ):
            name, is_lost = reply.headers.get(REPLICA, ""), False
            for line in reply.iter_lines():
                begun.add(number)
                is_lost = is_lost or '"replica_lost"' in line
        return name, is_lost

    victim = next(one for one in psutil.Process().children(recursive=True) if "ModelReplica" in " ".join(one.cmdline()))
    with ThreadPoolExecutor(streams) as threads:
        asked = [threads.submit(stream, number) for number in range(streams)]
        while len(begun) < streams:
            time.sleep(0.001)
        num_running = sum(not one.done() for one in asked)
        victim.kill()
        ends = [one.result() for one in asked]
    lost_names = {name for name, is_lost in ends if is_lost}
    after = [httpx2.post(f"{url}{ROUTE}", json={"prompt": [1], "max_tokens": 1}).status_code for _ in range(20)]
    return {
        "running": num_running,
        "lost": sum(is_lost for _, is_lost in ends),
        "of_the_dead_replica": sum(name in lost_names for name, _ in ends),
        "replicas_with_losses": len(lost_names),
        "answered_after": after.count(200) / len(after),
    }


def by_handle() -> Callable[[], None]:
    """Ray Serve's own call of a replica, without HTTP."""
    from ray import serve

    handle = serve.get_deployment_handle("ModelReplica", "qnext").options(stream=True)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": ROUTE,
        "query_string": b"",
    }
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    call = RoutedCall({**scope, "headers": headers, "root_path": ""}, json.dumps(_SMALL).encode())

    def once() -> None:
        for _ in handle.remote(call):
            pass

    return once


_SMALL = {"prompt": [1, 2, 3], "max_tokens": 1}
_STREAM = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True, "stream": True}


def first_event(client: httpx2.Client) -> float:
    """Seconds until it is there; the rest of the stream is not counted."""
    began = time.perf_counter()
    with client.stream("POST", ROUTE, json=_STREAM) as reply:
        lines = reply.raise_for_status().iter_lines()
        next(lines)
        seconds = time.perf_counter() - began
        for _ in lines:
            pass
    return seconds


def cost(urls: dict[str, str], *, rounds: int) -> dict[str, Any]:
    """Milliseconds of one small request each way, and of the first event of a stream, in turn; and what they are above
    the plain server."""
    clients = {name: httpx2.Client(base_url=url, timeout=300.0) for name, url in urls.items()}
    whole: dict[str, Callable[[], Any]] = {
        name: lambda client=client: client.post(ROUTE, json=_SMALL).raise_for_status()
        for name, client in clients.items()
    }
    whole["handle"] = by_handle()
    found = compared(whole, rounds=rounds)
    first: dict[str, Callable[[], Any]] = {
        name: lambda client=client: first_event(client) for name, client in clients.items()
    }
    return {**found, "first_event": compared(first, rounds=rounds)}


def compared(ways: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 20):
        for name, way in ways.items():
            began = time.perf_counter()
            seconds = way()
            if not isinstance(seconds, float):
                seconds = time.perf_counter() - began
            if round_ >= 20:
                times[name].append(1_000 * seconds)
    found: dict[str, Any] = {"ms": {name: quartiles(values) for name, values in times.items()}}
    for name, base in (("own", "plain"), ("proxy", "plain"), ("own", "handle")):
        if base in times:
            pairs = list(zip(times[name], times[base], strict=True))
            found[f"{name}_above_{base}_ms"] = quartiles([a - b for a, b in pairs])
            found[f"{name}_over_{base}"] = quartiles([a / b for a, b in pairs])
    return found


def quartiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": ordered[len(ordered) // 2],
        "q1": ordered[len(ordered) // 4],
        "q3": ordered[3 * len(ordered) // 4],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder with a tokenizer")
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1_500)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    model = str(Path(options.model).resolve())
    with (
        tempfile.TemporaryDirectory(prefix="qnext-ray-") as folder,
        plain_server(model, free_port()) as plain,
        replicas(model, Path(folder)) as (own, proxy),
    ):
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "cost": lambda: cost({"plain": plain, "own": own, "proxy": proxy}, rounds=options.rounds),
            "affinity": lambda: affinity(own, conversations=options.conversations, turns=options.turns),
            "killed": lambda: killed(own, streams=options.streams, tokens=options.tokens),
        }
        found = {}
        for name, measure in parts.items():
            found[name] = measure()
            print(json.dumps({name: found[name]}, indent=1), flush=True)
    print_json(found)


if __name__ == "__main__":
    main()
