"""What does a watch over the experts of a server cost, of decoding?

A server that watches copies the counters once a second, and looks at them after every 512 tokens. Both are timed for
the released shape (48 layers of 512 experts, and the layer that drafts) and for nano-5m. Their share of decoding is
against 512 tokens of nano-5m, the quickest model that there is: a larger one decodes slower and is looked at as often.
Processor time counts, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import statistics
import time

from _pair import print_json

import numpy as np
import torch

from qnext.config import preset
from qnext.engine import Engine, EngineConfig, ExpertCounts, SamplingParams
from qnext.model import CausalLM, initialize
from qnext.planning.expert_alerts import ExpertThresholds
from qnext.planning.expert_baseline import ExpertBaseline
from qnext.server.expert_watch import ExpertWatch, ExpertWatchConfig


def looks(num_layers: int, num_experts: int, top_k: int, rounds: int) -> list[float]:
    """Seconds of each look, every measure with a threshold."""
    generator = np.random.default_rng(0)
    layers = list(range(num_layers))
    blocks_BLE = generator.multinomial(64 * top_k, [1 / num_experts] * num_experts, size=(100, num_layers))
    thresholds = ExpertThresholds.parse("skew=8,dead=0.2,collapse=0.1,drift=0.1")
    watch = ExpertWatch(ExpertWatchConfig(thresholds, ExpertBaseline.of_blocks("m", layers, blocks_BLE), top_k))
    total_LE, found = np.zeros((num_layers, num_experts), dtype=np.int64), []
    for _ in range(rounds):
        total_LE = total_LE + generator.multinomial(512 * top_k, [1 / num_experts] * num_experts, size=num_layers)
        counts = ExpertCounts(layers, 0, 0, total_LE, total_LE)
        start = time.process_time()
        assert watch.look(counts)
        found.append(time.process_time() - start)
    return found


def decoding(rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of 512 tokens of nano-5m for eight requests at once, and of a copy of its counters."""
    model = CausalLM(preset("nano-5m"))
    initialize(model, seed=0)
    engine = Engine.of(model, EngineConfig(max_num_seqs=8, max_model_len=1024, count_experts=True))
    chunks, copies = [], []
    for number in range(rounds):
        for request in range(8):
            prompt = [1 + (number + request) % 90] * 8
            engine.add_request(prompt, SamplingParams(max_tokens=65, ignore_eos=True, temperature=0.0))
        engine.step()
        start = time.process_time()
        while engine.has_unfinished:
            engine.step()
        chunks.append(time.process_time() - start)
        start = time.process_time()
        engine.expert_counts(0)
        copies.append(time.process_time() - start)
    return chunks, copies


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    chunks, copies = decoding(rounds)
    found = {"decode_512": quartiles(chunks), "copy_nano": quartiles(copies)}
    for name, shape in {"nano-5m": (4, 64, 4), "80b-a3b": (49, 512, 10)}.items():
        found[f"look_{name}"] = quartiles(looks(*shape, rounds=max(rounds, 20)))
    for name, each in found.items():
        print(f"{name:<14} {1000 * each['median']:9.3f} ms ({1000 * each['low']:.3f} to {1000 * each['high']:.3f})")
    share = found["look_nano-5m"]["median"] / found["decode_512"]["median"]
    print(f"a look after 512 tokens of nano-5m: {share:.3%} of decoding them; the copy once a second besides")
    print_json({"benchmark": "expert_watch", "rounds": rounds, "share": share, "seconds": found})


if __name__ == "__main__":
    main()
