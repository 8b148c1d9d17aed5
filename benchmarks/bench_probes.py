"""What does it cost to look inside a model: of a forward pass, and of the steps of an engine?

Passes with and without a probe take turns on one model of released layer shapes, random weights in bf16. "off" beside
"off after" is a pass before any probe was there beside one after a probe has gone: what is left of it, and the noise.
Seconds are of the processor by default, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

from _pair import print_json

import torch

from qnext.config import preset
from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.probing import glance_at, probed
from qnext.model import Batch, CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.probe import EVERYWHERE, LAST, Edit, ModelProbe

RESIDUAL = ["layers.*.residual_in", "layers.*.residual_mid", "layers.*.residual_out"]
ROUTERS = ["layers.*.router.*"]
STEPS = ["layers.*.delta.core_out", "layers.*.attention.core_out"]

Looking = Callable[[], AbstractContextManager[object]]


def make_model(num_layers: int, num_experts: int) -> CausalLM:
    released = preset("80b-a3b").with_layers(num_layers)
    config = replace(released, num_experts=num_experts, vocab_size=8192, bos_token_id=None, eos_token_id=(1,))
    config = replace(config, num_nextn_predict_layers=0)
    with torch.device("cpu"):
        model = CausalLM(config).to(torch.bfloat16)
    initialize(model, seed=0)
    return model.requires_grad_(False)


def variants(model: CausalLM) -> dict[str, Looking]:
    same = [Edit(tap, lambda x: x) for tap in RESIDUAL]
    return {
        "off": nullcontext,
        "off after": nullcontext,
        "residual, last row": partial(ModelProbe, model, RESIDUAL, where=LAST),
        "residual, all rows": partial(ModelProbe, model, RESIDUAL, where=EVERYWHERE),
        "residual, identity edits": partial(ModelProbe, model, edits=same),
        "routers, last row": partial(ModelProbe, model, ROUTERS, where=LAST),
        "core_out, last row": partial(ModelProbe, model, STEPS, where=LAST),
    }


def time_forward(model: CausalLM, num_tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    tokens = torch.randint(model.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    batch = Batch.from_lengths(tokens, [num_tokens])
    ways = variants(model)
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        model(batch)
        for number in range(rounds):
            names = list(ways) if number % 2 else list(reversed(ways))
            for name in names:
                with ways[name]():
                    start = clock()
                    model(batch)
                    found[name].append(clock() - start)
    return found


def time_decode(model: CausalLM, steps: int, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of a step of one request, the mean over `steps` of them: without and with taps, all of them replayed, and
    with one glance, which runs in Python."""
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=4096, prefix_cache=False))
    ways: dict[str, Looking] = {
        "off": nullcontext,
        "off after": nullcontext,
        "norm, last row": partial(probed, engine, ["norm"], where=LAST),
        "residual, last row": partial(probed, engine, RESIDUAL, where=LAST),
        "one glance": nullcontext,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    total = (len(ways) * rounds + 2) * steps
    engine.add_request(list(range(1, 33)), SamplingParams(max_tokens=total, ignore_eos=True, temperature=0.0))
    for _ in range(steps):
        engine.step()
    for number in range(rounds):
        for name in list(ways) if number % 2 else list(reversed(ways)):
            with ways[name]():
                if name == "one glance":
                    glance_at(engine)
                start = clock()
                for _ in range(steps):
                    engine.step()
                found[name].append((clock() - start) / steps)
    engine.close()
    return found


def compared(title: str, found: dict[str, list[float]]) -> dict[str, object]:
    """Ratios to "off" of the same round."""
    told: dict[str, object] = {}
    for name, seconds in found.items():
        ratios = sorted(one / base - 1 for one, base in zip(seconds, found["off"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        middle = statistics.median(ratios)
        milliseconds = 1000 * statistics.median(seconds)
        told[name] = {"milliseconds": milliseconds, "share": middle, "quartiles": [low, high]}
        print(f"{title:<16} {name:<26} {milliseconds:9.2f} ms {middle:+7.2%} ({low:+.2%} to {high:+.2%})", flush=True)
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--steps", type=int, default=20, help="of decode in a measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="clock time instead of the processor's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    clock = time.perf_counter if options.wall else time.process_time
    model = make_model(options.layers, options.experts)
    result: dict[str, object] = {}
    for num_tokens in options.tokens:
        title = f"forward {num_tokens}"
        result[title] = compared(title, time_forward(model, num_tokens, options.rounds, clock))
    result["decode"] = compared("decode", time_decode(model, options.steps, options.rounds, clock))
    print_json({"benchmark": "probes", "layers": options.layers, "threads": options.threads, **result})


if __name__ == "__main__":
    main()
