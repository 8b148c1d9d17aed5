"""How long does training wait for a snapshot: written at once, and on a thread while the next steps run?

Two equal runs, one of each kind, take turns: a step, a snapshot, and steps beside the thread. The wait is the time from
the report of the step to the first batch of the next one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from _pair import print_json

import numpy as np
import torch

from qnext.config import preset
from qnext.model import CausalLM, initialize
from qnext.ops import keep_freed_memory
from qnext.planning import machine
from qnext.training import Hooks, PackedStream, StepMetrics, TrainBatch, TrainConfig, Trainer

KINDS = ("at once", "on a thread")


class TimedStream(PackedStream):
    """Measures the time from `waits_since` to the next batch."""

    waits_since: float | None = None
    wait = 0.0

    def next_batch(self) -> TrainBatch:
        if self.waits_since is not None:
            self.wait, self.waits_since = time.perf_counter() - self.waits_since, None
        return super().next_batch()


class Turns:
    """A run that takes turns with another one."""

    def __init__(self, given: argparse.Namespace, folder: Path, *, waits: bool) -> None:
        self._waits, self._steps = waits, given.steps
        model = CausalLM(preset(given.model))
        initialize(model, seed=0)
        config = TrainConfig(
            lr=1e-3,
            tokens_per_batch=given.tokens,
            sequence_length=given.tokens,
            total_steps=10**6,
            snapshot_every=given.steps,
            optimizer="muon",
            precision="float32",
            health_every=0,
        )
        rng = np.random.default_rng(0)
        documents = [rng.integers(0, model.config.vocab_size, given.tokens).astype(np.int32) for _ in range(16)]
        self._stream = TimedStream(documents, tokens_per_batch=given.tokens, sequence_length=given.tokens, seed=0)
        self._trainer = Trainer(model, self._stream, config, folder=folder, hooks=Hooks(on_step=self._on_step))
        self._trainer.run(until_step=self._steps // 2)
        self.turn()

    def _on_step(self, metrics: StepMetrics) -> None:
        self._stream.waits_since = time.perf_counter() if metrics.step % self._steps == 0 else None

    def turn(self) -> float:
        """Seconds of the wait. The first snapshot of a run takes memory for its copies."""
        with mock.patch.object(machine, "available_bytes", (lambda: 0) if self._waits else machine.available_bytes):
            self._trainer.run(until_step=self._trainer.step + self._steps)
        return self._stream.wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="micro-20m")
    parser.add_argument("--out", type=Path, help="folder on the disk that is meant; default: that of temporary files")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="from a snapshot to the next")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=given.out) as folder:
        runs = {name: Turns(given, Path(folder, name), waits=name == KINDS[0]) for name in KINDS}
        found: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(given.rounds):
            for name, run in runs.items():
                found[name].append(run.turn())
        newest = sorted(Path(folder, KINDS[0], "snapshots").iterdir())[-1]
        num_bytes = sum(file.stat().st_size for file in newest.iterdir())
    print(f"{given.model}: {num_bytes / 1e6:.0f} MB in a snapshot")
    for name, waits in found.items():
        print(f"{name:<12} {statistics.median(waits):.3f} s ({min(waits):.3f} to {max(waits):.3f})")
    print_json({"benchmark": "snapshots", "bytes": num_bytes, **vars(given), "out": str(given.out), "waits": found})


if __name__ == "__main__":
    main()
