"""How fast do two ranks with one thread each train, beside one process with two threads, on the same cores?

All sides train one model on the same micro batches, and take turns. Ranks bring no memory bandwidth of their own here,
so what is lost is what they send each other and the wait for each other. With --memory nothing is trained: it prints
what a rank has held at most when its model was made, in parts and whole.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from _pair import print_json, ratios

import numpy as np
import torch
import torch.distributed as dist

from qnext.config import preset
from qnext.model import CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.parallel.join import open_store
from qnext.parallel.train.ranks import Division, RanksOfRun
from qnext.planning import machine
from qnext.training import PackedStream, TrainConfig, Trainer
from qnext.training.ranks import ALONE, TrainingRanks


class Way(NamedTuple):
    """`makes_whole`: each rank makes the whole model, and then keeps its part."""

    num_ranks: int = 2
    division: Division = Division()
    makes_whole: bool = False


WAYS = {
    "one process": Way(1),
    "two ranks": Way(),
    "experts on ranks": Way(division=Division(expert=2)),
    "rows on ranks": Way(division=Division(context=2)),
}
MADE = {"in parts": Way(), "whole, then cut": Way(makes_whole=True)}


def rank_of_run(given: argparse.Namespace, way: Way, rank: int, port: int, orders: Connection) -> None:
    """A process: tells its peak of memory when the model is there, and then trains as many steps as it is told."""
    torch.set_num_threads(given.threads // way.num_ranks)
    keep_freed_memory()
    ranks: TrainingRanks = ALONE
    if way.num_ranks > 1:
        store = dist.PrefixStore("run", open_store("127.0.0.1", port, is_first=False))
        ranks = RanksOfRun(store, rank, way.num_ranks, way.division, patience=120.0)
    before, config = machine.peak_bytes(), preset(given.model)
    if way.makes_whole:
        model = CausalLM(config)
        initialize(model, seed=0)
        ranks.shard(model)
    else:
        model = ranks.new_model(config, seed=0)
    orders.send(machine.peak_bytes() - before)
    trainer = _trainer(given, model, ranks)
    with suppress(EOFError):  # the parent has all that it wants
        while True:
            until_step = trainer.step + orders.recv()
            begun = time.perf_counter()
            trainer.run(until_step=until_step)
            orders.send(time.perf_counter() - begun)


def _trainer(given: argparse.Namespace, model: CausalLM, ranks: TrainingRanks) -> Trainer:
    config = TrainConfig(
        lr=1e-3,
        tokens_per_batch=given.tokens,
        sequence_length=min(512, given.tokens),
        total_steps=10**6,
        accumulation=2,
        precision="float32",
        health_every=0,
    )
    rng = np.random.default_rng(0)
    length = config.sequence_length
    documents = [rng.integers(0, model.config.vocab_size, length).astype(np.int32) for _ in range(64)]
    stream = PackedStream(documents, tokens_per_batch=given.tokens, sequence_length=length, seed=0)
    return Trainer(model, stream, config, ranks=ranks)


class Side:
    """The processes of one way."""

    def __init__(self, given: argparse.Namespace, way: Way, port: int) -> None:
        context = mp.get_context("spawn")
        self._orders: list[Connection] = []
        for rank in range(way.num_ranks):
            ours, theirs = context.Pipe()
            context.Process(target=rank_of_run, args=(given, way, rank, port, theirs), daemon=True).start()
            self._orders.append(ours)
        self.peaks = [orders.recv() for orders in self._orders]

    def seconds(self, num_steps: int) -> float:
        for orders in self._orders:
            orders.send(num_steps)
        return max(orders.recv() for orders in self._orders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano-5m")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro batch; a step has two")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--memory", action="store_true", help="of making the model, in place of the speed")
    given = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "train_ranks", **vars(given)}
    stores = [open_store("127.0.0.1", 0, is_first=True) for _ in WAYS]
    ways = MADE if given.memory else WAYS
    sides = {name: Side(given, way, store.port) for (name, way), store in zip(ways.items(), stores, strict=False)}
    if given.memory:
        for name, side in sides.items():
            result[name] = side.peaks
            print(f"{name:<16} {max(side.peaks) / 2**20:8.0f} MiB")
        print_json(result)
        return
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(given.rounds + 1):
        for name, side in sides.items():
            found = side.seconds(given.steps)
            seconds[name] += [found] if round_ else []
    for name, each in seconds.items():
        speed = ratios(seconds["one process"], each)
        rate = 2 * given.tokens * given.steps / statistics.median(each)
        result[name] = {"tokens_per_second": rate, "speed": speed}
        print(f"{name:<16} {rate:8.0f} tokens/s, {speed['median']:.2f}x ({speed['min']:.2f} to {speed['max']:.2f})")
    print_json(result)


if __name__ == "__main__":
    main()
