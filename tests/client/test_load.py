"""A load on a server: its prompts and times, of a real server, and of one that fails."""

from __future__ import annotations

import asyncio
import http.server
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import httpx2
import pytest

from qnext.client.load import CHAT, COMPLETIONS, LoadOutcome, Timing, Workload, arrivals, run_load
from qnext.client.load_prompts import LoadPrompt, PromptServer, RandomPrompts, prompts_of_file
from qnext.client.load_report import measured
from qnext.errors import UsageError
from tests.pace import slowness
from tests.server.serving import Running, running_server


@pytest.fixture(scope="module")
def server(chat_folder: Path) -> Iterator[Running]:
    with running_server(chat_folder) as running:
        yield running


def test_random_prompts_are_as_long_as_said() -> None:
    prompts = RandomPrompts(10, 4, prefix_len=3).make(5, range(50), seed=1)
    assert [len(prompt.content) for prompt in prompts] == [13] * 5 and {prompt.num_output for prompt in prompts} == {4}
    assert len({tuple(prompt.content[:3]) for prompt in prompts}) == 1
    assert len({tuple(prompt.content[3:]) for prompt in prompts}) == 5
    assert prompts == RandomPrompts(10, 4, prefix_len=3).make(5, range(50), seed=1)
    assert prompts != RandomPrompts(10, 4, prefix_len=3).make(5, range(50), seed=2)
    lengths = {len(prompt.content) for prompt in RandomPrompts(10, 4, range_ratio=0.5).make(200, range(50), seed=1)}
    assert lengths == set(range(5, 16))


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_requests_come_at_their_rate(burstiness: float) -> None:
    times = list(itertools.islice(arrivals(Workload(COMPLETIONS, rate=20.0, burstiness=burstiness, seed=3)), 20_000))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.0 and fmean(gaps) == pytest.approx(1 / 20, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)
    assert list(itertools.islice(arrivals(Workload(COMPLETIONS)), 3)) == [0.0, 0.0, 0.0]


def test_figures_of_known_times() -> None:
    first = Timing(began=10.0, first=10.5, last=11.5, gaps=[0.25, 0.75], num_pieces=3, num_prompt=7, num_output=5)
    second = Timing(began=10.0, first=11.0, last=11.0, num_pieces=1, num_prompt=3)
    lost = Timing(began=10.0, error="503: full")
    outcome = LoadOutcome([first, second, lost], seconds=2.0, client_seconds=0.5, latest_send=0.001, peak=3)
    found = measured(Workload(CHAT), outcome, goals={"ttft": 500, "tpot": 250}, percentiles=[50, 100])
    assert (found["completed"], found["failed"], found["errors"]) == (2, 1, {"503: full": 1})
    assert (found["input_tokens"], found["output_tokens"]) == (10, 6)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1.0, 3.0, 8.0)
    assert found["goodput"] == 0.5 and found["client_load"] == 0.25
    assert found["ttft_ms"] == {"mean": 750.0, "std": 250.0, "max": 1000.0, "p50": 750.0, "p100": 1000.0}
    assert found["tpot_ms"]["mean"] == 250.0, "of answers with a second token alone"
    assert found["itl_ms"]["max"] == 750.0 and found["e2el_ms"]["p100"] == 1500.0
    nothing = measured(Workload(CHAT), LoadOutcome([lost], 1.0, 0.0, 0.0, 1), goals={}, percentiles=[50])
    assert nothing["ttft_ms"] is None and "goodput" not in nothing


def test_never_more_in_flight_than_said(server: Running) -> None:
    prompts = RandomPrompts(4, 3).make(9, range(200), seed=0)
    load = Workload(
        COMPLETIONS, max_concurrency=2, body={"ignore_eos": True}
    )  # an answer without a token counts as none
    outcome = run_load(server.url, {"Content-Type": "application/json"}, load, prompts)
    assert outcome.peak == 2 and len(outcome.timings) == 9 and all(timing.is_answered for timing in outcome.timings)


def test_prompts_for_chat_have_about_that_many_tokens(server: Running) -> None:
    with server.client() as client:
        source = PromptServer(client, "chat")
        assert len(source.vocabulary()) > 256
        letters = client.post("/tokenize", json={"prompt": "abcdefghijk"}).json()["tokens"]
        (prompt,) = RandomPrompts(40, 1).make(1, letters, seed=0)
        text = source.as_text(prompt)
        assert isinstance(text.content, str) and len(text.content) == 40


class Slow(http.server.BaseHTTPRequestHandler):
    """Three tokens, 30 ms between, the first after 60 ms; to the prompt "break" an error instead of the last."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        time.sleep(0.03)
        role: dict[str, Any] = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        self._send(role)
        for number in range(3):
            time.sleep(0.03)
            if number == 2 and "break" in str(body["messages"]):
                self._send({"error": {"message": "gone"}})
                return
            self._send({"choices": [{"delta": {"reasoning_content": "a"}}]})
        self._send({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self._send({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
        self.wfile.write(b": ping\n\ndata: [DONE]\n\n")

    def _send(self, document: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def slow_server() -> Iterator[str]:
    fake = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=fake.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{fake.server_address[1]}"
    finally:
        fake.shutdown()
        fake.server_close()


def test_times_are_those_of_tokens() -> None:
    """Not of the role's piece, nor of the end. Only lower bounds: another process may hold the machine."""
    with slow_server() as url:
        prompts = [LoadPrompt("fine", 3), LoadPrompt("break", 3)]
        outcome = run_load(url, {}, Workload(CHAT, max_concurrency=1), prompts)
    good, broken = outcome.timings
    assert good.is_answered and good.num_pieces == 3 and (good.num_prompt, good.num_output) == (5, 3)
    assert good.ttft >= 0.06 and len(good.gaps) == 2 and sum(good.gaps) >= 0.055
    assert good.tpot == pytest.approx(sum(good.gaps) / 2)
    assert broken.error == "in the stream: gone"


def test_a_server_that_is_gone_is_an_error_of_each_request() -> None:
    outcome = run_load("http://127.0.0.1:9", {}, Workload(COMPLETIONS), [LoadPrompt("a", 1)] * 2)
    assert [timing.error for timing in outcome.timings] == ["ConnectError: All connection attempts failed"] * 2


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text('[{"prompt": "a"}, {"prompt": "b", "output_tokens": 9}]')
    found = prompts_of_file(path, 5, output_len=4, seed=0)
    assert len(found) == 5 and {(prompt.content, prompt.num_output) for prompt in found} == {("a", 4), ("b", 9)}
    for text, message in (("{}", "entry 1 has neither"), ("x", "not JSON"), ("[]", "no prompt"), ("[3]", "entry 1")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            prompts_of_file(path, 1, output_len=1, seed=0)


def test_the_client_is_not_what_is_measured() -> None:
    """Answers from memory, no server: the client's own cost of a piece stays far below a token's time."""
    pieces = 2_000
    frame = b'data: {"choices":[{"text":" word","finish_reason":null}]}\n\n'

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": frame * pieces})

    async def main() -> Timing:
        from qnext.client.load import _timed

        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(stream), base_url="http://test") as client:
            return await _timed(client, COMPLETIONS, b"{}")

    best = math.inf
    for _ in range(5):
        began = time.process_time()
        timing = asyncio.run(main())
        best = min(best, (time.process_time() - began) / pieces)
    assert timing.num_pieces == pieces and best < 0.0005 * slowness()
