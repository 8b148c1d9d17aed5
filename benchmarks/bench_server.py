"""What does HTTP cost: streams through the server against the engine alone, its first byte, and health under load?

Server and engine are one process, the client is another on the same cores; they take turns within a run. `measure`
says what the figures are. MODEL is a folder with a tokenizer, by default the standard CPU model in int4-g32 (see
bench_inference.py); several are measured one after another, `--small` and `--like-standard` among them. Prompts are
random token ids. The line of delays alone, on both, in two minutes: --small --like-standard --only delays
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _pair import print_json

import httpx2
from _arrivals import Answer, ask_together, delays, small_requests, tail
from _streams import RandomTokens, rate_of, write_together
from bench_inference import STANDARD, made_model, standard_model

from qnext.bench.contest import spread
from qnext.bench.files import BenchFiles

PROMPT_TOKENS = 64


def watch_tokens(engine: Any, tokens: dict[tuple[int, ...], list[float]]) -> None:
    """From now on note when each token came, under its prompt."""
    from qnext.engine import TokenEvent

    step, add_requests = engine.step, engine.add_requests
    prompts: dict[str, tuple[int, ...]] = {}

    def adding(prompt: Any, *arguments: Any, **more: Any) -> Any:
        requests = add_requests(prompt, *arguments, **more)
        prompts.update({request.id: tuple(prompt) for request in requests})
        return requests

    def watched() -> Any:
        events = step()
        now = time.monotonic()
        for event in events:
            if isinstance(event, TokenEvent) and event.request_id in prompts:
                tokens.setdefault(prompts[event.request_id], []).append(now)
        return events

    engine.step = watched
    engine.add_requests = adding


def serve_here(folder: str, max_model_len: int, num_streams: int, pipe: Connection) -> None:
    """The process of the server. Answers "engine" with the rate of the engine alone, "tokens" with the times of the
    tokens of each prompt since the last time it was asked."""
    from qnext.checkpoint import load_model
    from qnext.engine import Engine, EngineConfig, SamplingParams
    from qnext.ops import keep_freed_memory
    from qnext.server.inference.served import ServedModel
    from qnext.server.run import Listen, Urls, serve
    from qnext.server.server import Server
    from qnext.text.tokenizer import Tokenizer

    tokens: dict[tuple[int, ...], list[float]] = {}  # by prompt
    keep_freed_memory()

    def load() -> tuple[Engine, ServedModel]:
        model = load_model(Path(folder), check_finite=False)
        engine = Engine.of(
            model,
            EngineConfig(max_num_seqs=num_streams, max_model_len=max_model_len, speculation=False, prefix_cache=False),
        )
        watch_tokens(engine, tokens)
        served = ServedModel(
            Tokenizer.from_folder(folder),
            None,
            names=["model"],
            vocab_size=model.config.vocab_size,
            max_model_len=max_model_len,
            eos_ids=engine.eos_token_ids,
        )
        return engine, served

    def obey(server: Server, urls: Urls) -> None:
        pipe.send((urls.public, server.served.vocab_size))
        threading.Thread(target=answer, args=(server,), daemon=True).start()

    def answer(server: Server) -> None:
        while True:
            question, *arguments = pipe.recv()
            if question == "tokens":
                pipe.send(dict(tokens))
                tokens.clear()
                continue
            prompts, max_tokens = arguments
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            engine = server.worker.engine
            server.worker.call(
                lambda: pipe.send(write_together(engine, prompts, [params] * len(prompts)).tokens_per_second)  # noqa: B023
            )

    serve(Server, load, Listen(port=0), on_ready=obey)


async def health(url: str, prompts: list[list[int]], max_tokens: int, num_idle: int) -> list[float]:
    """Seconds of each answer of /health/live while streams run beside idle connections."""
    port = int(url.rsplit(":", 1)[1])
    idle = []
    for _ in range(num_idle):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await writer.drain()
        await reader.readuntil(b"}")
        idle.append(writer)
    running = asyncio.ensure_future(ask_together(url, prompts, max_tokens))
    seconds: list[float] = []
    async with httpx2.AsyncClient(base_url=url, timeout=60.0) as client:
        while not running.done():
            began = time.perf_counter()
            assert (await client.get("/health/live")).status_code == 200
            seconds.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)
    await running
    for writer in idle:
        writer.close()
    return seconds


def seconds_to_ready(folder: Path) -> float:
    """Of the whole command `qnext serve`."""
    command = [sys.executable, "-m", "qnext", "serve", str(folder), "--port", "0"]
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if found := re.match(r"ready: (\S+)", line):
                url = found[1]
                break
        assert httpx2.get(f"{url}/health/ready").status_code == 200
        seconds = time.perf_counter() - began
        process.terminate()
    return seconds


def show(name: str, figure: dict[str, float], target: str) -> None:
    p99 = f"  p99 {figure['p99']:.3f}" if "p99" in figure else ""
    print(f"{name:<56} {figure['median']:.3f} ({figure['min']:.3f}-{figure['max']:.3f}){p99}  {target}", flush=True)


class Bench:
    """A server on a model in a process of its own, and what is asked of it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        length = PROMPT_TOKENS + options.tokens + 16
        arguments = (str(folder), length, options.streams, theirs)
        self._process = context.Process(target=serve_here, args=arguments, daemon=True)
        self._process.start()
        self.url, vocab_size = self._pipe.recv()
        self._tokens = RandomTokens(vocab_size)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def prompts(self, number: int) -> list[list[int]]:
        return [self._tokens.take(PROMPT_TOKENS) for _ in range(number)]

    def alone(self) -> float:
        """Tokens a second of the engine by itself."""
        self._pipe.send(("engine", self.prompts(self.options.streams), self.options.tokens))
        return float(self._pipe.recv())

    def ask(self, number: int, max_tokens: int, *, stream: bool = True) -> tuple[list[Answer], list[list[float]]]:
        """Answers to new prompts, and the times of the engine's tokens of each."""
        prompts = self.prompts(number)
        self._pipe.send(("tokens",))
        self._pipe.recv()
        answers = asyncio.run(ask_together(self.url, prompts, max_tokens, stream=stream))
        self._pipe.send(("tokens",))
        made = self._pipe.recv()
        return answers, [made[tuple(prompt)] for prompt in prompts]

    def through_http(self) -> float:
        answers, _ = self.ask(self.options.streams, self.options.tokens)
        return rate_of([answer.tokens for answer in answers], self.options.tokens)

    def rates(self) -> dict[str, float]:
        """Tokens a second through HTTP over the engine's alone, in turn."""
        rates = []
        for index in range(self.options.rounds):
            pair = {f.__name__: f() for f in ((self.alone, self.through_http)[:: 1 if index % 2 else -1])}
            rates.append(pair["through_http"] / pair["alone"])
        return spread(rates)

    def delays(self, number: int) -> dict[str, dict[str, float]]:
        """What streams, so many at once, come behind the engine: see `_arrivals.delays`, and whole answers."""
        found: dict[str, list[float]] = {"first": [], "token": [], "gap": [], "whole": []}
        for _ in range(self.options.rounds * (1 if number > 1 else 4)):
            for name, values in delays(*self.ask(number, self.options.tokens)).items():
                found[name] += values
            answers, made = self.ask(number, self.options.tokens, stream=False)
            pairs = zip(answers, made, strict=True)
            found["whole"] += [1000 * (answer.pieces[0][0] - times[-1]) for answer, times in pairs]
        return {name: tail(values) for name, values in found.items()}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model; what is measured is shown at once. Delays in milliseconds, for 1 and all streams.

    first, token, gap: from the engine's first token, and from each, to the client; how far gaps are from the engine's.
    whole: from the engine's last token to the first byte of an answer that is not streamed. streams: tokens a second
    through HTTP over the engine's alone, driven by hand. health: answers of /health/live beside idle connections and
    active streams. ready: seconds from the command to the first answer of /health/ready (whole commands).
    """
    bench, found = Bench(folder, options), {}
    print(f"{folder}:", flush=True)
    bench.alone(), bench.through_http()  # warm up
    found["small_ms"] = tail([1000 * seconds for seconds in small_requests(bench.url, 400)])
    show("small request on a kept connection, ms", found["small_ms"], "")
    for number in (1, options.streams):
        found[f"delays_{number}_ms"] = figures = bench.delays(number)
        for name, what, target in (
            ("first", "first byte after the engine's first token", "<= 2"),
            ("token", "each token after the engine's", ""),
            ("gap", "gap between tokens against the engine's", "<= 1"),
            ("whole", "whole answer after the engine's last token", ""),
        ):
            show(f"{number} at once: {what}, ms", figures[name], target)
    if options.only != "delays":
        found["streams"] = bench.rates()
        show(f"{options.streams} streams through HTTP over the engine alone", found["streams"], ">= 0.95")
        answers = asyncio.run(health(bench.url, bench.prompts(options.active), options.tokens, options.idle))
        found["health_ms"] = tail([1000 * seconds for seconds in answers])
        name = f"health beside {options.idle} idle and {options.active} active connections, ms"
        show(name, found["health_ms"], "max < 100")
    bench.close()
    if options.only != "delays":
        os.environ["PYTHONPATH"] = os.getcwd()
        found["ready_s"] = spread([seconds_to_ready(folder) for _ in range(3)])
        show("seconds from the command to ready", found["ready_s"], "< 3")
    return found


def folders(options: argparse.Namespace) -> list[Path]:
    found = list(options.model)
    if options.small:
        found.append(made_model(Path("runs/nano-5m"), ("nano-5m", "--dtype", "float32")))
    if options.like_standard:
        shallow = (STANDARD[0], "--layers", "4", "--experts", "16", *STANDARD[5:])
        found.append(
            BenchFiles(made_model(Path("runs/like-standard"), shallow), Path("runs/bench")).folder_of("int4-g32")
        )
    return found or [BenchFiles(Path(standard_model()), Path("runs/bench")).folder_of("int4-g32")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="*", help="model folders")
    parser.add_argument("--small", action="store_true", help="a model of 5 M parameters in fp32")
    parser.add_argument("--like-standard", action="store_true", help="four layers of the standard model's, in int4-g32")
    parser.add_argument("--only", choices=["delays"], help="leave out rates, health and start")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=int, default=200)
    parser.add_argument("--active", type=int, default=32)
    options = parser.parse_args()
    print_json({str(folder): measure(folder, options) for folder in folders(options)})


if __name__ == "__main__":
    main()
