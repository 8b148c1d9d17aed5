"""Ray with replicas of a model on this machine, in processes of their own: `python -m tests.replicas.cluster`.

The program obeys lines of JSON, which are arguments of deploy/ray_serve.py, and says "up" when they are in force.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.docs.snippets import ROOT

ROUTER_RESOURCE = "for_the_router"


@dataclass
class Cluster:
    """Replicas behind `url`."""

    url: str
    process: subprocess.Popen[str]
    folder: Path

    def deploy(self, **arguments: Any) -> None:
        """Give the application these arguments, and wait until they are in force."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().strip()
        assert said == "up", (self.folder / "log").read_text()[-5_000:]

    def client(self, key: str | None = None, *, url: str | None = None) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=url or self.url, headers=headers, timeout=120.0)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the replicas that run."""
        return [one for one in self.processes() if "ServeReplica:qnext:ModelReplica" in " ".join(_command(one))]

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def cluster(*, num_cpus: int = 2, application: str = "ray_serve") -> Iterator[Cluster]:
    """Ray without replicas. At the end nothing of it is left, neither processes nor files.

    `application` is a module with a function `app`, as deploy/ray_serve.py.
    """
    folder = Path(tempfile.mkdtemp(prefix="qnext-ray-"))  # sockets have short names
    port = free_port()
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the home of the user
        "PYTHONPATH": f"{ROOT}:{ROOT / 'deploy'}",
    }
    command = [sys.executable, "-m", "tests.replicas.cluster", str(folder), str(port), str(num_cpus), application]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT
        )
    running = Cluster(f"http://127.0.0.1:{port}", process, folder)
    left: list[psutil.Process] = []
    try:
        yield running
    finally:
        left = running.processes() if process.poll() is None else []
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()
            _, left = psutil.wait_procs(left, 20)
            for one in left:
                one.send_signal(signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
    assert not left, left


def _command(one: psutil.Process) -> list[str]:
    try:
        return one.cmdline()
    except psutil.Error:
        return []


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(folder: str, port: str, num_cpus: str, application: str) -> None:
    """The process that has Ray."""
    import ray
    from ray import serve

    app = importlib.import_module(application).app
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    resources = {ROUTER_RESOURCE: 1}
    ray.init(num_cpus=int(num_cpus), resources=resources, include_dashboard=False, _temp_dir=folder, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, logging_config={"log_level": "WARNING"})
    for line in sys.stdin:
        serve.run(app(json.loads(line)), name="qnext", route_prefix="/")
        print("up", file=out, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
