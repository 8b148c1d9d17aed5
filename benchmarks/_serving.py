"""What the engine spares and what it costs: parts of bench_engine.py on one model, each a figure and its target."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _pair import ratios

from _llama_server import Server
from _streams import RandomTokens, first_token_seconds, make_engine, rate_of, write_together

from qnext.bench.contest import spread
from qnext.engine import SamplingParams
from qnext.model import CausalLM

Figure = dict[str, Any]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def second_turn(model: CausalLM, *, length: int, rounds: int) -> Figure:
    """Time to the first token of a question about a conversation of `length` tokens, over that of the first turn."""
    answer, question = min(32, length // 8), min(40, length // 8)
    tokens = RandomTokens(model.config.vocab_size)
    engine = make_engine(model, speculate=False, max_num_seqs=1, max_model_len=length + answer)
    first_token_seconds(engine, tokens.take(answer), answer)  # warms up
    cold, warm = [], []
    for _ in range(rounds):
        prompt = tokens.take(length - answer - question)
        seconds, answered = first_token_seconds(engine, prompt, answer)
        cold.append(seconds)
        warm.append(first_token_seconds(engine, [*prompt, *answered, *tokens.take(question)], answer)[0])
        print(f"  first turn {cold[-1]:.3f} s, second {warm[-1]:.3f} s", flush=True)
    return {
        "figure": f"second turn at {length}: time to first token over the first turn's",
        "ratio": ratios(warm, cold),
        "target": 0.03,
        "at_most": True,
        "cold_seconds": spread(cold),
        "warm_seconds": spread(warm),
    }


def shared_prompt(model: CausalLM, *, shared: int, own: int, num_requests: int) -> Figure:
    """Prompt tokens that were computed for requests with a common beginning, over what they have apart and it once."""
    tokens = RandomTokens(model.config.vocab_size)
    engine = make_engine(model, speculate=False, max_num_seqs=num_requests, max_model_len=shared + own + 4)
    system = tokens.take(shared)
    start = time.perf_counter()
    completions = engine.generate([system + tokens.take(own) for _ in range(num_requests)], greedy(2))
    seconds = time.perf_counter() - start
    computed = sum(len(c.prompt_ids) - c.num_cached_tokens for c in completions)
    least = shared + num_requests * own
    print(f"  {computed} prompt tokens computed for {num_requests} x {shared + own}, {seconds:.2f} s", flush=True)
    return {
        "figure": f"{num_requests} requests share {shared}: prompt tokens computed over the least",
        "ratio": spread([computed / least]),
        "target": 1.0,
        "at_most": True,
        "computed": computed,
        "least": least,
    }


def many_streams(
    model: CausalLM, *, counts: Sequence[int], prompt: int, output: int, rounds: int, server: Server | None
) -> Iterator[Figure]:
    """Tokens a second of several streams together: over one stream's, and over llama.cpp's server with as many.

    `counts` ascend.
    """
    tokens = RandomTokens(model.config.vocab_size)
    engine = make_engine(model, speculate=False, max_num_seqs=max(counts), max_model_len=prompt + output)
    rates: dict[str, list[float]] = {}
    shares: list[float] = []
    for round_ in range(1 + rounds):
        now: dict[str, float] = {}
        for count in counts:
            prompts = [tokens.take(prompt) for _ in range(count)]
            phase = write_together(engine, prompts, [greedy(output)] * count)
            now[f"{count}"] = phase.tokens_per_second
        if server is not None:
            answers = server.streams(prompts, output)
            now["llama.cpp"] = rate_of([answer.arrivals for answer in answers], output)
            now["llama.cpp by its own clock"] = sum(answer.tokens_per_second for answer in answers)
        if round_:  # the first one warms up
            for name, rate in now.items():
                rates.setdefault(name, []).append(rate)
            shares.append(phase.scheduler_share)
            shown = ", ".join(f"{name}: {rate:.1f}" for name, rate in now.items())
            print(f"  tokens a second of streams: {shown}; scheduler {shares[-1]:.2%}", flush=True)
    about = {"tokens_per_second": {name: spread(values) for name, values in rates.items()}}
    one, most = counts[0], counts[-1]
    for count in counts[1:]:
        target = 3.0 if (one, count) == (1, 16) else None
        yield {
            "figure": f"tokens a second of {count} streams over {one}",
            "ratio": ratios(rates[f"{count}"], rates[f"{one}"]),
            "target": target,
            **about,
        }
    if server is not None:
        yield {
            "figure": f"tokens a second of {most} streams over llama.cpp's server",
            "ratio": ratios(rates[f"{most}"], rates["llama.cpp"]),
            "target": 1.5,
        }
    yield {
        "figure": f"scheduler's share of a step of {most} streams",
        "ratio": spread(shares),
        "target": 0.02,
        "at_most": True,
    }


def start_server(binary: str, gguf: Path, *, num_streams: int, context: int, threads: int) -> Server:
    """With a slot for each stream. What it could keep of prompts is off, which spares it work: none comes twice."""
    options = ["-np", str(num_streams), "-c", str(num_streams * context), "-t", str(threads)]
    options += ["--cache-ram", "0", "--ctx-checkpoints", "0"]
    server = Server(binary, gguf, options)
    slots = server.get("/slots")
    if len(slots) != num_streams or any(slot["n_ctx"] < context for slot in slots):
        server.close()
        raise RuntimeError(f"llama-server came up with other slots: {[slot['n_ctx'] for slot in slots]}")
    return server
