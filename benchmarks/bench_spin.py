"""How long should OpenMP's threads watch for work before they sleep, alone and beside a process that is never idle?

torch divides its operations among threads of libgomp, and a thread that is done watches for the next one: 300,000
times by default, some milliseconds, in which it holds a core that another may need. GOMP_SPINCOUNT bounds that; it is
read when torch is loaded, so every value has processes of its own, which are timed in turn. Work: a model of 5 M
parameters quantised by the reference and by the kernels, a training step of it, a prefill and a decoding step.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _pair import Contestants, Step, machine, print_json, ratios

DEFAULT = "default"
SPIN, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"


def quantize(*, threads: int, model: str) -> Step:
    from qnext.checkpoint.quantize import quantize_folder
    from qnext.ops import set_num_threads
    from qnext.quant.scheme import make_policy

    set_num_threads(threads)
    out = Path(tempfile.mkdtemp())

    def step() -> None:
        quantize_folder(model, out / "out", policy=make_policy("int4-g32", head=None, is_tied=True))
        shutil.rmtree(out / "out")

    return step


def train(*, threads: int, model: str) -> Step:
    from bench_train_step import ours

    return ours(name="nano-5m", sequences=4, length=32, threads=threads)


def serve(*, threads: int, model: str, length: int) -> Step:
    """A prompt of `length` tokens, or 16 tokens one after another."""
    import torch

    from qnext.checkpoint import load_model
    from qnext.engine import Engine, SamplingParams
    from qnext.ops import set_num_threads

    set_num_threads(threads)
    engine = Engine.of(load_model(model, dtype=torch.float32))
    params = SamplingParams(max_tokens=1 if length > 1 else 16, temperature=0.0, ignore_eos=True)

    def step() -> None:
        engine.add_request(list(range(1, 1 + length)), params)
        while engine.has_unfinished:
            engine.step()

    return step


WORK: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "quantize, torch": (quantize, "torch", {}),
    "quantize": (quantize, "", {}),
    "training step": (train, "", {}),
    "prefill 512": (serve, "", {"length": 512}),
    "decode 16": (serve, "", {"length": 1}),
}


def _never_idle() -> None:
    while True:
        pass


@contextmanager
def _busy(count: int) -> Iterator[None]:
    processes = [mp.get_context("spawn").Process(target=_never_idle, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    for name in (SPIN, POLICY):
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def measure(name: str, spins: list[str], *, model: str, threads: int, rounds: int, busy: int) -> dict[str, Any]:
    worker, backend, more = WORK[name]
    arguments = {"threads": threads, "model": model, **more}
    sides: dict[str, Contestants] = {}
    seconds: dict[str, list[float]] = {spin: [] for spin in spins}
    try:
        for spin in spins:
            # With one of the two variables set, qnext leaves both alone.
            chosen = {SPIN: "300000" if spin == DEFAULT else spin} | ({"QNEXT_BACKEND": backend} if backend else {})
            with _environment(chosen):
                sides[spin] = Contestants({spin: (worker, arguments)})
        for round_ in range(rounds + 1):
            for spin, side in sides.items():
                duration, _ = side.step(spin)
                if round_:
                    seconds[spin].append(duration)
    finally:
        for side in sides.values():
            side.close()
    return {
        "work": name,
        "busy_processes": busy,
        "spins": spins,
        "milliseconds": {spin: [1e3 * statistics.median(each), 1e3 * min(each)] for spin, each in seconds.items()},
        "times_faster_than_default": {spin: ratios(seconds[DEFAULT], seconds[spin]) for spin in spins},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spins", nargs="+", default=[DEFAULT, "0", "1000", "10000", "100000"])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1], help="processes that are never idle")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    from qnext.checkpoint import create_folder
    from qnext.config import preset

    results = []
    print(f"{machine()['cpu']}, {options.threads} threads; milliseconds, and how many times faster than by default")
    with tempfile.TemporaryDirectory() as folder:
        create_folder(preset("nano-5m"), Path(folder) / "model", seed=0)
        for busy in options.busy:
            for name in options.work:
                with _busy(busy):
                    result = measure(
                        name,
                        options.spins,
                        model=f"{folder}/model",
                        threads=options.threads,
                        rounds=options.rounds,
                        busy=busy,
                    )
                results.append(result)
                print(f"{name}, {busy} busy")
                for spin, ratio in result["times_faster_than_default"].items():
                    median, least = result["milliseconds"][spin]
                    print(
                        f"  {spin:>8} {median:9.1f} (least {least:9.1f})   {ratio['median']:6.2f} "
                        f"({ratio['min']:.2f}-{ratio['max']:.2f})",
                        flush=True,
                    )
    print_json({"benchmark": "spin", "threads": options.threads, "results": results})


if __name__ == "__main__":
    main()
