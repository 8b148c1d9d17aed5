"""What does a training step take in memory, beside what `qnext plan --train` says?

Each point is a process of its own: a model with random weights, the training loop on random tokens in fp32, three
steps. What the process took before it had a model is subtracted from its peak in the last step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from _pair import machine, print_json

from qnext.config import preset
from qnext.planning.training_plan import TrainingWish, rank_memory


class Point(NamedTuple):
    """A model and how it is trained: one micro batch of `sequences` of `length` tokens."""

    model: str
    sequences: int
    length: int
    recomputes: bool

    @property
    def wish(self) -> TrainingWish:
        return TrainingWish(
            "pretrain",
            tokens=1.0,
            sequence_length=self.length,
            mfu=1.0,
            states="fp32",
            recomputes=self.recomputes,
            sequences=self.sequences,
        )


POINTS = (
    Point("nano-5m", 8, 512, False),
    Point("nano-5m", 32, 512, False),
    Point("nano-5m", 32, 512, True),
    Point("micro-20m", 4, 512, False),
    Point("micro-20m", 16, 512, False),
    Point("micro-20m", 16, 512, True),
    Point("micro-20m", 4, 2048, False),
    Point("mini-90m", 2, 512, False),
    Point("mini-90m", 8, 512, False),
    Point("mini-90m", 8, 512, True),
    Point("mini-90m", 2, 2048, False),
    Point("small-200m", 4, 512, False),
    Point("small-200m", 4, 512, True),
    Point("base-450m", 2, 512, False),
    Point("nano-5m", 16, 1024, False),
)


def _resident(name: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")


def _run(point: Point, threads: int) -> None:
    """In the process of a point: prints the bytes that training takes at most, and those between steps."""
    import numpy as np
    import torch

    from qnext.model import CausalLM, initialize
    from qnext.ops import keep_freed_memory
    from qnext.training import PackedStream, TrainConfig, Trainer

    torch.set_num_threads(threads)
    keep_freed_memory()
    config = preset(point.model)
    warm = torch.ones(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()  # autograd's threads, and the library of products
    before = _resident("VmRSS")
    model = CausalLM(config)
    initialize(model, seed=0)
    rows = point.sequences * point.length
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4 * point.sequences, point.length + 1))
    stream = PackedStream(list(tokens.astype(np.int32)), tokens_per_batch=rows, sequence_length=point.length, seed=0)
    settings = TrainConfig(
        lr=1e-3,
        tokens_per_batch=rows,
        sequence_length=point.length,
        total_steps=3,
        checkpoint_activations=point.recomputes,
        precision="float32",
        health_every=0,
        expert_stats_every=0,
    )
    trainer = Trainer(model, stream, settings)
    trainer.run(until_step=2)
    between = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    trainer.run()
    print(json.dumps({"peak": _resident("VmHWM") - before, "between": between - before}))


def measure(point: Point, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--point", json.dumps(point), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    plan = rank_memory(preset(point.model), point.wish, 1)
    return {**point._asdict(), **found, "planned": plan.total, "plan": vars(plan), "ratio": plan.total / found["peak"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", help="only points of these")
    parser.add_argument("--points", type=int, default=len(POINTS), help="only the first so many")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        _run(Point(*json.loads(options.point)), options.threads)
        return
    results = []
    print(f"{machine()['cpu']}, {options.threads} threads, fp32")
    for point in [p for p in POINTS if options.models is None or p.model in options.models][: options.points]:
        found = measure(point, options.threads)
        results.append(found)
        print(
            f"{point.model:<11} {point.sequences:3} x {point.length:<5} {'recomputed' if point.recomputes else '':<11}"
            f"peak {found['peak'] / 2**20:7.0f} MiB, planned {found['planned'] / 2**20:7.0f} ({found['ratio']:.2f})",
            flush=True,
        )
    errors = [abs(found["ratio"] - 1) for found in results]
    print(f"off by {statistics.median(errors):.0%} at the median, {max(errors):.0%} at most")
    print_json({"benchmark": "training_memory", "threads": options.threads, "results": results})


if __name__ == "__main__":
    main()
