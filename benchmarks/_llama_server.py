"""llama.cpp's server on a loopback port, asked one thing at a time or by many clients at once."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from qnext.openmp import environment_of_others

_GREEDY = {"temperature": 0, "top_k": 1, "cache_prompt": False}


class Stream(NamedTuple):
    """An answer as its client saw it come."""

    arrivals: list[float]  # when each token came
    tokens_per_second: float  # by the server's own clock, from the first token on


class Server:
    """llama-server with `options`; comes up or raises RuntimeError. Without `port`, a free one."""

    def __init__(self, binary: Path | str, gguf: Path, options: Sequence[str], *, port: int | None = None) -> None:
        self._port = port or _free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        command = [str(binary), "-m", str(gguf), "--port", str(self._port), "--no-webui", *options]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment_of_others()
        )
        for _ in range(1800):
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self._url + "/health")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        self.close()
        raise RuntimeError(f"llama-server did not come up with {gguf}")

    def get(self, route: str) -> Any:
        with urllib.request.urlopen(self._url + route) as answer:
            return json.loads(answer.read())

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def complete(self, ids: list[int], num_tokens: int, **options: Any) -> dict[str, Any]:
        """The greedy answer to a prompt of token ids, up to a token that ends texts."""
        return self.post("/completion", prompt=ids, n_predict=num_tokens, **_GREEDY, **options)

    def streams(self, prompts: Sequence[list[int]], num_tokens: int) -> list[Stream]:
        """Greedy answers of just `num_tokens`, all prompts asked for at once, a client thread for each."""
        with ThreadPoolExecutor(len(prompts)) as clients:
            return list(clients.map(lambda ids: self._stream(ids, num_tokens), prompts))

    def _stream(self, ids: list[int], num_tokens: int) -> Stream:
        body = {"prompt": ids, "n_predict": num_tokens, "ignore_eos": True, "stream": True, **_GREEDY}
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        times, last = [], b""
        while line := answer.readline():
            if line.startswith(b"data: "):
                times.append(time.perf_counter())
                last = line
        connection.close()
        end = json.loads(last.removeprefix(b"data: "))
        if end.get("tokens_predicted") != num_tokens:
            raise RuntimeError(f"{num_tokens} tokens were asked for, the answer ends with {last[:200]!r}")
        return Stream(times[:-1], end["timings"]["predicted_per_second"])  # the end is a message of its own

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
