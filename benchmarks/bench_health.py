"""What does a look at the health of a run cost, of a step of training?

Steps with and without it take turns on the same model and data, fp32, one thread. Processor time counts, so that other
work on the machine disturbs little. A run looks at every tenth step: it pays a tenth of what stands here.
"""

from __future__ import annotations

import argparse
import statistics
import time

from _pair import print_json

import numpy as np
import torch

from qnext.config import preset
from qnext.model import CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.training import PackedStream, TrainConfig, Trainer


def measure(name: str, *, tokens: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of a step without and with the look, in pairs."""
    config = preset(name)
    model = CausalLM(config)
    initialize(model, seed=0)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, config.vocab_size, 700).astype(np.int32) for _ in range(50)]
    length = min(512, tokens)
    stream = PackedStream(documents, tokens_per_batch=tokens, sequence_length=length, seed=0)
    trainers = []
    for every in (0, 1):
        train = TrainConfig(
            lr=1e-4,
            tokens_per_batch=tokens,
            sequence_length=length,
            total_steps=10**6,
            optimizer="muon",
            precision="float32",
            expert_stats_every=0,
            health_every=every,
        )
        trainers.append(Trainer(model, stream, train))
        trainers[-1].run(until_step=1)
    pairs = []
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            trainers[index].run(until_step=trainers[index].step + 1)
            seconds[index] = time.process_time() - start
        pairs.append((seconds[0], seconds[1]))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["nano-5m", "micro-20m"])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = {}
    for name in options.models:
        pairs = measure(name, tokens=options.tokens, rounds=options.rounds)
        shares = sorted(with_it / without - 1.0 for without, with_it in pairs)
        low, high = shares[len(shares) // 4], shares[-1 - len(shares) // 4]
        step = statistics.median(without for without, _ in pairs)
        middle = statistics.median(shares)
        found[name] = {"step_seconds": step, "share": middle, "quartiles": [low, high]}
        print(f"{name:<12} step {step:.3f} s, a look {middle:+.1%} ({low:+.1%} to {high:+.1%})", flush=True)
    print_json({"benchmark": "health", "tokens": options.tokens, "models": found})


if __name__ == "__main__":
    main()
