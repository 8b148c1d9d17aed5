"""A mixed load on a server process for minutes: do memory, slots, connections and answers stay as they were?

python -m tests.server.soak --minutes 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.server.process import process
from tests.server.serving import save_served

CANARY = {"prompt": "The canary sings", "max_tokens": 24, "temperature": 0}
HOSTILE: list[tuple[str, bytes]] = [
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}'),
    ("/v1/completions", b"[" * 100_000),
    ("/v1/completions", b'{"prompt": [99999999]}'),
    ("/v1/chat/completions", b'{"messages": []}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "n": 1000000}'),
    ("/v1/chat/completions", json.dumps({
        "messages": [{"role": "user", "content": "a"}], "guided_regex": "(" * 900}).encode()),
    ("/v1/completions", b'{"prompt": "' + b"a" * 1_000_000 + b'"}'),
    ("/v1/messages", b'{"model": "x"}'),
    ("/tokenize", b'{"prompt": 5}'),
]  # fmt: skip


@dataclass
class Report:
    """What was done and seen. `slope` is bytes of resident memory a minute after the first third, with its error."""

    seconds: float = 0.0
    answered: int = 0
    disconnected: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    slope: float = 0.0
    slope_error: float = 0.0
    slots_running: int = -1
    waiting: int = -1

    def summarise(self) -> None:
        """Least squares over what was measured when the caches were full."""
        start = self.seconds / 3
        points = np.array([(t / 60, m) for t, m in self.resident if t >= start])
        times = points[:, 0] - points[:, 0].mean()
        self.slope = float(times @ points[:, 1] / (times @ times))
        rest = points[:, 1] - points[:, 1].mean() - self.slope * times
        # Neighbouring samples are alike: count one for every ten.
        free = max(1.0, len(points) / 10 - 2)
        self.slope_error = float(np.sqrt(rest @ rest / len(points) / free * len(points) / (times @ times)))


async def _client(url: str, seed: int, end: float, report: Report, canary: str) -> None:
    """One user: three quarters of the requests are read to their end, a fifth is left, one in twenty is hostile."""
    dice = random.Random(seed)
    async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:
        while time.monotonic() < end:
            kind = dice.random()
            try:
                if kind < 0.05:
                    path, body = dice.choice(HOSTILE)
                    answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
                    report.refused += 1
                    if not 400 <= answer.status_code < 500:
                        report.wrong.append(f"{path} {body[:60]!r}: {answer.status_code}")
                elif kind < 0.25:
                    await _leave(client, dice)
                    report.disconnected += 1
                elif kind < 0.45:
                    answer = await client.post("/v1/completions", json=CANARY)
                    report.answered += 1
                    if answer.status_code != 200 or answer.json()["choices"][0]["text"] != canary:
                        report.wrong.append(f"canary: {answer.status_code} {answer.text[:200]}")
                else:
                    path, question = _question(dice)
                    answer = await client.post(path, json=question)
                    report.answered += 1
                    if answer.status_code not in (200, 503):
                        report.wrong.append(f"{answer.status_code} {answer.text[:200]}")
            except httpx2.HTTPError as error:
                report.wrong.append(f"{type(error).__name__}: {error}")


def _question(dice: random.Random) -> tuple[str, dict[str, Any]]:
    words = " ".join(f"{dice.randrange(1000)}" for _ in range(dice.randrange(1, 120)))
    return "/v1/chat/completions", {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": dice.randrange(1, 64),
        "n": dice.choice((1, 1, 2)),
        "temperature": dice.choice((0, 0.8)),
    }


async def _leave(client: httpx2.AsyncClient, dice: random.Random) -> None:
    """Ask for a long answer and go: at once, while the prompt is read, or after some tokens."""
    path, body = _question(dice)
    body |= {"max_tokens": 1000, "stream": dice.random() < 0.7, "ignore_eos": True}

    async def read() -> None:
        async with client.stream("POST", path, json=body) as answer:
            async for _ in answer.aiter_raw():
                pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), dice.choice((0.001, 0.02, 0.1, 0.5)))


async def _watch(pid: int, began: float, end: float, report: Report) -> None:
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        report.resident.append((time.monotonic() - began, int(resident.split()[1]) << 10))
        report.files.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        await asyncio.sleep(1.0)


def gauges(url: str) -> dict[str, float]:
    """Every gauge and counter of /metrics without labels of its own, by name."""
    text = httpx2.get(f"{url}/metrics").text
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def soak(model: Path, *, minutes: float, num_clients: int = 12) -> Report:
    """Run the load. The server has little cache, so that its limits are met early."""
    report = Report()
    with process(model, "--max-num-seqs", 8, "--max-model-len", 1536) as one:
        with one.client() as client:
            canary = client.post("/v1/completions", json=CANARY).json()["choices"][0]["text"]
        began = time.monotonic()
        end = began + 60 * minutes

        async def run() -> None:
            clients = [_client(one.url, seed, end, report, canary) for seed in range(num_clients)]
            await asyncio.gather(_watch(one.popen.pid, began, end, report), *clients)

        asyncio.run(run())
        report.seconds = time.monotonic() - began
        time.sleep(2.0)
        now = gauges(one.url)
        report.waiting = int(now["qnext_num_requests_waiting"])
        report.slots_running = int(now["qnext_num_requests_running"])
    report.summarise()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(save_served(Path(folder) / "tiny"), minutes=options.minutes)
    shown = asdict(report)
    shown["resident"] = [
        report.resident[0],
        *report.resident[:: max(1, len(report.resident) // 20)],
        report.resident[-1],
    ]
    shown["files"] = [min(report.files), max(report.files), report.files[-1]]
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
