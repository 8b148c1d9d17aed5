"""Is one commit as fast as another? Both take turns, each in a process of its own interpreter.

The jobs are those of `_time_commit.py`, and "start", from the command to the loaded model. The other commit is a
checkout with a `.venv`, or an interpreter; MODEL is a folder that both read. A ratio above one: this commit is faster.

    python benchmarks/check_same_speed.py --baseline ../base MODEL ...
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path
from typing import Any

from _pair import print_json, ratios

from check_same_bits import interpreter

WORKER = Path(__file__).resolve().parent / "_time_commit.py"
HERE = Path(__file__).resolve().parent.parent
JOBS = ("decode", "prefill", "streams", "train")


class Side:
    """A commit at work."""

    def __init__(self, python: Path, model: str) -> None:
        began = time.perf_counter()
        command = [str(python), str(WORKER), model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise SystemExit(f"{python} cannot time {model}")
        self.start_seconds = time.perf_counter() - began

    def time(self, job: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{job}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def measure(pythons: tuple[Path, Path], model: str, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds by job, of the baseline and of this commit. Who begins changes from round to round."""
    starts: list[list[float]] = [[], []]
    for _ in range(3):
        for found, python in zip(starts, pythons, strict=True):
            side = Side(python, model)
            found.append(side.start_seconds)
            side.close()
    sides = [Side(python, model) for python in pythons]
    seconds: dict[str, list[list[float]]] = {job: [[], []] for job in JOBS}
    for number in range(rounds + 2):
        for job in JOBS:
            for which in (0, 1) if number % 2 else (1, 0):
                took = sides[which].time(job)
                if number > 1:  # the first ones warm up
                    seconds[job][which].append(took)
    for side in sides:
        side.close()
    return {**seconds, "start": starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    pythons = (interpreter(options.baseline), interpreter(HERE))
    result: dict[str, Any] = {}
    for model in options.models:
        print(f"{model}: seconds of the baseline over those of this commit, {options.rounds} rounds")
        found = measure(pythons, model, options.rounds)
        result[model] = {job: ratios(old, new) for job, (old, new) in found.items()}
        for job, ratio in result[model].items():
            print(f"{job:<8} {ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})", flush=True)
    print_json(result)


if __name__ == "__main__":
    main()
