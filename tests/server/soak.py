"""A mixed load with attacks on a server process for minutes: do memory, speed and others' answers stay as they were?

python -m tests.server.soak --minutes 20

Twelve users ask, read, leave and check a canary; attackers with keys of their own send what `soak_attacks` lists,
bytes that are no HTTP, and open streams that they do not read. One process watches /health/live, beside a server that
does nothing: what both wait for is the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.server.hostile.wire import CLOSED, KEY, statuses, talk
from tests.server.hostile.wire_cases import REQUESTS
from tests.server.process import ROOT, Process, process
from tests.server.serving import save_served
from tests.server.soak_attacks import ATTACKS, CHAT, COMPLETIONS, CONTEXT, GROUPS, LATER
from tests.server.soak_health import Pulse, start_watching, stop_watching

CANARY = {"prompt": "The canary sings", "max_tokens": 24, "temperature": 0}
NUM_USERS, NUM_ATTACKERS, NUM_STALLED = 12, 4, 40
STALLED_SECONDS = 25.0
_WATCH_SECONDS = 1.0
_BLOCK_SECONDS = 10.0
# Of hostile bytes those that are over soon: the soak is no test of timeouts.
WIRE = [
    case
    for case in REQUESTS
    if not case.is_heavy and case.seconds <= 1.0 and all(isinstance(part, bytes) for part in case.parts)
]


@dataclass
class Report:
    """What was done and seen. Memory in bytes, of the server alone, and with its children.

    `slope` is bytes of resident memory a minute after the first third, `slope_error` its standard error.
    """

    seconds: float = 0.0
    answered: int = 0
    disconnected: int = 0
    attacked: Counter[str] = field(default_factory=Counter)  # by "name: status"
    wrong: list[str] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    most_with_children: int = 0
    children: set[int] = field(default_factory=set)
    left_over: list[int] = field(default_factory=list)  # children that outlived their server
    files: list[int] = field(default_factory=list)
    health: Pulse = field(default_factory=Pulse)
    slope: float = 0.0
    slope_error: float = 0.0
    slots_running: int = -1
    waiting: int = -1
    exit_code: int | None = None

    def summarise(self) -> None:
        late = [(t, m) for t, m in self.resident if t >= self.seconds / 3]
        self.slope, self.slope_error = robust_slope(late)


def robust_slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(slope a minute, its standard error) of values over seconds: the median of the slopes between all pairs of
    medians of ten seconds. The error is that of a jackknife which leaves out one eighth of the time after another.

    >>> robust_slope([(float(t), 5.0 + 2.0 * t / 60) for t in range(600)])[0]
    2.0
    """
    blocks: dict[int, list[tuple[float, float]]] = {}
    for when, value in points:
        blocks.setdefault(int(when / _BLOCK_SECONDS), []).append((when / 60, value))
    medians = np.array([np.median(np.array(block), axis=0) for block in blocks.values()])
    parts = min(8, len(medians) // 2)
    if parts < 2:
        return 0.0, float("inf")

    def slope(some: Any) -> float:
        first, second = np.triu_indices(len(some), 1)
        return float(np.median((some[second, 1] - some[first, 1]) / (some[second, 0] - some[first, 0])))

    number = np.arange(len(medians)) * parts // len(medians)
    without = np.array([slope(medians[number != part]) for part in range(parts)])
    return slope(medians), float(np.sqrt((parts - 1) / parts * np.sum((without - without.mean()) ** 2)))


@dataclass
class _Soak:
    """One run: where the server is, who asks, until when."""

    url: str
    user: str  # keys
    limited: Sequence[str]
    end: float
    report: Report
    canary: str
    groups: Sequence[str]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, key: str) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=self.url, timeout=90.0, headers={"Authorization": f"Bearer {key}"})

    def is_on(self) -> bool:
        return time.monotonic() < self.end

    # ---- users ----

    async def be_user(self, seed: int) -> None:
        """Three quarters of the requests are read to their end, a quarter is left."""
        dice = random.Random(seed)
        async with self.client(self.user) as client:
            while self.is_on():
                kind = dice.random()
                try:
                    if kind < 0.22:
                        await _leave(client, dice)
                        self.report.disconnected += 1
                    elif kind < 0.45:
                        await self.check_canary(client)
                    else:
                        answer = await client.post(CHAT, json=_question(dice))
                        self.report.answered += 1
                        if answer.status_code not in (200, 503):
                            self.report.wrong.append(f"user: {answer.status_code} {answer.text[:200]}")
                except httpx2.HTTPError as error:
                    self.report.wrong.append(f"user: {type(error).__name__}: {error}")

    async def check_canary(self, client: httpx2.AsyncClient) -> None:
        answer = await client.post(COMPLETIONS, json=CANARY)
        self.report.answered += 1
        if answer.status_code != 200 or answer.json()["choices"][0]["text"] != self.canary:
            self.report.wrong.append(f"canary: {answer.status_code} {answer.text[:200]}")

    async def be_limited(self, key: str, seed: int) -> None:
        """A user above the limits of its key: most requests are told to come later."""
        dice = random.Random(seed)
        async with self.client(key) as client:
            while self.is_on():
                body = _question(dice) | {"max_tokens": 16}
                await self.attack(client, f"limited {key[-4:]}", CHAT, json.dumps(body).encode(), (200, 400, *LATER))
                await asyncio.sleep(0.3)

    # ---- attackers ----

    async def be_attacker(self, seed: int) -> None:
        dice = random.Random(seed)
        chosen = [attack for attack in ATTACKS if attack.group in self.groups]
        weights = [attack.weight for attack in chosen]
        async with self.client(KEY) as client:
            while self.is_on() and chosen:
                (one,) = dice.choices(chosen, weights)
                await self.attack(client, one.name, one.path, one.body(dice), one.statuses, **one.headers)
                await asyncio.sleep(dice.choice((0.0, 0.05, 0.5)))

    async def attack(
        self, client: httpx2.AsyncClient, name: str, path: str, body: bytes, right: Sequence[int], **headers: str
    ) -> None:
        try:
            answer = await client.post(path, content=body, headers={"Content-Type": "application/json", **headers})
        except httpx2.HTTPError as error:
            # A server may close while a body is on its way that it does not want.
            is_large = len(body) > 1 << 20 and isinstance(error, (httpx2.WriteError, httpx2.ReadError))
            self.report.attacked[f"{name}: {type(error).__name__}"] += 1
            if not is_large:
                self.report.wrong.append(f"{name}: {type(error).__name__}: {error}")
            return
        self.report.attacked[f"{name}: {answer.status_code}"] += 1
        if answer.status_code not in right:
            self.report.wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")

    async def be_rude(self, seed: int) -> None:
        """Bytes that are no HTTP, or nearly."""
        dice = random.Random(seed)
        while self.is_on():
            case = dice.choice(WIRE)
            parts = tuple(p.replace(b"Host: x", b"Host: localhost") for p in case.parts if isinstance(p, bytes))
            received, is_closed, _ = await asyncio.to_thread(talk, self.address, replace(case, parts=parts))
            status = next(iter(statuses(received)), CLOSED if is_closed else -1)
            self.report.attacked[f"wire {case.name}: {status}"] += 1
            # What the other Host of a case means is for its own test to say; here nothing may be the server's fault.
            if status >= 500 and status not in (*case.statuses, 501, 505):
                self.report.wrong.append(f"wire {case.name}: {status}")
            await asyncio.sleep(0.1)

    async def stall(self, seed: int) -> None:
        """Streams of one key that nobody reads, again and again."""
        body = json.dumps({"prompt": "a", "max_tokens": CONTEXT - 8, "ignore_eos": True, "stream": True}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        while self.is_on():
            with contextlib.ExitStack() as stack:
                for _ in range(NUM_STALLED):
                    one = stack.enter_context(socket.socket())
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
                    one.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(one, self.address)
                    one.send(head.encode() + body)
                self.report.attacked["stalled streams"] += NUM_STALLED
                await asyncio.sleep(min(STALLED_SECONDS, max(0.0, self.end - time.monotonic())))
            await asyncio.sleep(5.0)

    # ---- all together ----

    async def run(self, pid: int, began: float) -> None:
        tasks = [self.be_user(seed) for seed in range(NUM_USERS)]
        tasks += [self.be_attacker(100 + seed) for seed in range(NUM_ATTACKERS)]
        tasks += [self.be_limited(key, 200 + seed) for seed, key in enumerate(self.limited)]
        if "wire" in self.groups:
            tasks += [self.be_rude(300 + seed) for seed in range(2)]
        if "stalled" in self.groups:
            tasks.append(self.stall(400))
        await asyncio.gather(self.watch(pid, began), *tasks)

    async def watch(self, pid: int, began: float) -> None:
        while self.is_on():
            own = resident(pid)
            children = _children(pid)
            self.report.children |= children
            self.report.resident.append((time.monotonic() - began, own))
            self.report.most_with_children = max(
                self.report.most_with_children, own + sum(resident(child) for child in children)
            )
            self.report.files.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
            await asyncio.sleep(_WATCH_SECONDS)


def _question(dice: random.Random) -> dict[str, Any]:
    words = " ".join(f"{dice.randrange(1000)}" for _ in range(dice.randrange(1, 120)))
    return {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": dice.randrange(1, 64),
        "n": dice.choice((1, 1, 2)),
        "temperature": dice.choice((0, 0.8)),
    }


async def _leave(client: httpx2.AsyncClient, dice: random.Random) -> None:
    """Ask for a long answer and go: at once, while the prompt is read, or after some tokens."""
    body = _question(dice) | {"max_tokens": 1000, "stream": dice.random() < 0.7, "ignore_eos": True}

    async def read() -> None:
        async with client.stream("POST", CHAT, json=body) as answer:
            async for _ in answer.aiter_raw():
                pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), dice.choice((0.001, 0.02, 0.1, 0.5)))


def resident(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) << 10
    return 0


def _children(pid: int) -> set[int]:
    """Of all its threads."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def gauges(url: str, key: str) -> dict[str, float]:
    """Every gauge and counter of /metrics without labels of its own, by name."""
    text = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}).text
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def _new_key(file: Path, name: str, *limits: object) -> str:
    command = [sys.executable, "-m", "qnext", "keys", "create", "--file", str(file), "--name", name, *map(str, limits)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def soak(model: Path, folder: Path, *, minutes: float, groups: Sequence[str] = GROUPS) -> Report:
    """Run the load. The server has little cache, in memory and on disk, so that its limits are met early."""
    report = Report()
    file = folder / "keys.json"
    user = _new_key(file, "user", "--scope", "inference", "--scope", "tokenize", "--scope", "metrics")
    limited = [_new_key(file, "few", "--rpm", 60, "--max-parallel", 2), _new_key(file, "short", "--tpm", 3_000)]
    flags = ["--max-num-seqs", 8, "--max-model-len", CONTEXT, "--keys", file, "--api-key", KEY]
    flags += ["--disk-cache", folder / "cache", "--disk-cache-bytes", "64M", "--audit-log", folder / "audit.jsonl"]
    with process(model, *flags) as one:
        with one.client(user) as client:
            canary = client.post(COMPLETIONS, json=CANARY).json()["choices"][0]["text"]
        watching = start_watching(one.url)
        began = time.monotonic()
        run = _Soak(one.url, user, limited, began + 60 * minutes, report, canary, groups)
        asyncio.run(run.run(one.popen.pid, began))
        report.seconds = time.monotonic() - began
        report.health = stop_watching(watching)
        _end(one, user, report)
    report.summarise()
    return report


def _end(one: Process, key: str, report: Report) -> None:
    """What is left when nobody asks any more, and when the server is told to stop."""
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        now = gauges(one.url, key)
        report.waiting = int(now["qnext_num_requests_waiting"])
        report.slots_running = int(now["qnext_num_requests_running"])
        if not (report.waiting or report.slots_running):
            break
        time.sleep(0.5)
    report.children |= _children(one.popen.pid)
    one.signal(signal.SIGTERM)
    report.exit_code = one.wait(60.0)
    report.left_over = [child for child in report.children if resident(child)]


def shown(report: Report) -> dict[str, Any]:
    """The report for one line of JSON: long lists thinned out."""
    found = asdict(report) | {"health": report.health.figures()}
    found["resident"] = report.resident[:: max(1, len(report.resident) // 20)] + report.resident[-1:]
    found["files"] = [min(report.files), max(report.files), report.files[-1]]
    found["children"] = len(report.children)
    found["attacked"] = dict(sorted(report.attacked.items()))
    found["num_wrong"], found["wrong"] = len(report.wrong), report.wrong[:40]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--without", choices=GROUPS, action="append", default=[], help="leave a group of attacks out")
    options = parser.parse_args()
    groups = [group for group in GROUPS if group not in options.without]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = soak(save_served(folder / "tiny"), folder, minutes=options.minutes, groups=groups)
    print(json.dumps(shown(report)))


if __name__ == "__main__":
    main()
