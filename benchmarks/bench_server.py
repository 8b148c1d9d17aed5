"""What does HTTP cost: streams through the server against the engine alone, its first byte, and health under load?

Server and engine are one process, the client is another on the same cores; they take turns within a run.

  streams  tokens a second of so many streams through HTTP over those of the engine alone, driven by hand
  first    from the engine's first token of a request to its first byte at the client, milliseconds
  health   the slowest answer of /health/live beside idle connections and active streams, milliseconds
  ready    seconds from the command to the first answer of /health/ready (whole commands)

MODEL is a folder with a tokenizer, by default the standard CPU model in int4-g32 (see bench_inference.py). Prompts are
random token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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
from _streams import RandomTokens, rate_of, write_together
from bench_inference import standard_model

from qnext.cli._bench_files import BenchFiles
from qnext.eval.contest import spread

PROMPT_TOKENS = 64


def serve_here(folder: str, max_model_len: int, num_streams: int, pipe: Connection) -> None:
    """The process of the server. Answers "engine" with the rate of the engine alone, "first" with the times of the
    first tokens since the last time it was asked."""
    from qnext.checkpoint import load_model
    from qnext.engine import Engine, SamplingParams, TokenEvent
    from qnext.ops import keep_freed_memory
    from qnext.server.app import Server
    from qnext.server.run import Listen, Urls, serve
    from qnext.server.served import ServedModel
    from qnext.text.tokenizer import Tokenizer

    first: dict[str, float] = {}
    keep_freed_memory()

    def load() -> tuple[Engine, ServedModel]:
        model = load_model(Path(folder), check_finite=False)
        engine = Engine(model, max_num_seqs=num_streams, max_model_len=max_model_len, speculation=False,
                        prefix_cache=False)  # fmt: skip
        step = engine.step

        def watched() -> Any:
            events = step()
            now = time.monotonic()
            for event in events:
                if isinstance(event, TokenEvent):
                    first.setdefault(event.request_id, now)
            return events

        engine.step = watched  # type: ignore[method-assign]
        served = ServedModel(
            Tokenizer.from_folder(folder), None, names=["model"], vocab_size=model.config.vocab_size,
            max_model_len=max_model_len,
            eos_ids=engine.eos_token_ids,
        )  # fmt: skip
        return engine, served

    def obey(server: Server, urls: Urls) -> None:
        pipe.send((urls.public, server.served.vocab_size))
        threading.Thread(target=answer, args=(server,), daemon=True).start()

    def answer(server: Server) -> None:
        while True:
            question, *arguments = pipe.recv()
            if question == "first":
                pipe.send(list(first.values()))
                first.clear()
                continue
            prompts, max_tokens = arguments
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            engine = server.worker.engine
            server.worker.call(
                lambda: pipe.send(write_together(engine, prompts, [params] * len(prompts)).tokens_per_second)  # noqa: B023
            )

    serve(Server, load, Listen(port=0), on_ready=obey)


async def one_stream(client: httpx2.AsyncClient, prompt: list[int], max_tokens: int) -> list[float]:
    """Times (monotonic) at which the tokens of one stream came."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    times: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit((await answer.aread()).decode())
        async for chunk in answer.aiter_raw():
            times += [time.monotonic()] * chunk.count(b'"text":')
    return times


async def together(url: str, prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
    limits = httpx2.Limits(max_connections=len(prompts) + 8)
    async with httpx2.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:
        return await asyncio.gather(*(one_stream(client, prompt, max_tokens) for prompt in prompts))


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
    running = asyncio.ensure_future(together(url, prompts, max_tokens))
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
    print(f"{name:<56} {figure['median']:.3f} ({figure['min']:.3f}-{figure['max']:.3f})  {target}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="model folder")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=int, default=200)
    parser.add_argument("--active", type=int, default=32)
    options = parser.parse_args()
    if options.model is None:
        options.model = BenchFiles(Path(standard_model()), Path("runs/bench")).folder_of("int4-g32")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    length = PROMPT_TOKENS + options.tokens + 16
    process = multiprocessing.get_context("spawn").Process(
        target=serve_here, args=(str(options.model), length, options.streams, theirs), daemon=True
    )
    process.start()
    url, vocab_size = ours.recv()
    tokens = RandomTokens(vocab_size)

    def prompts(number: int) -> list[list[int]]:
        return [tokens.take(PROMPT_TOKENS) for _ in range(number)]

    def alone() -> float:
        ours.send(("engine", prompts(options.streams), options.tokens))
        return float(ours.recv())

    def through_http() -> float:
        return rate_of(asyncio.run(together(url, prompts(options.streams), options.tokens)), options.tokens)

    alone(), through_http()  # warm up
    rates = []
    for index in range(options.rounds):
        pair = {f.__name__: f() for f in ((alone, through_http) if index % 2 else (through_http, alone))}
        rates.append(pair["through_http"] / pair["alone"])
    streams = spread(rates)
    show(f"{options.streams} streams through HTTP over the engine alone", streams, ">= 0.95")
    ours.send(("first",))
    ours.recv()
    arrived = [asyncio.run(together(url, prompts(1), 2))[0][0] for _ in range(8 * options.rounds)]
    ours.send(("first",))
    first = spread([1000 * (a - b) for a, b in zip(arrived, ours.recv(), strict=True)])
    show("first byte after the engine's first token, ms", first, "<= 5")
    answers = asyncio.run(health(url, prompts(options.active), options.tokens, options.idle))
    slowest = spread([1000 * seconds for seconds in answers])
    show(f"health beside {options.idle} idle and {options.active} active connections, ms", slowest, "max < 100")
    process.terminate()
    process.join()
    os.environ["PYTHONPATH"] = os.getcwd()
    ready = spread([seconds_to_ready(options.model) for _ in range(3)])
    show("seconds from the command to ready", ready, "< 3")
    print_json({"streams": streams, "first_byte_ms": first, "health_ms": slowest, "ready_s": ready,
                "model": json.loads((options.model / "config.json").read_text()).get("num_hidden_layers")})  # fmt: skip


if __name__ == "__main__":
    main()
