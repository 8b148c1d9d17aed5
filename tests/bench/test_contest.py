"""Contestants in processes of their own: turns, errors, ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qnext.bench.contest import Contestants, Step, machine, ratios, spread
from qnext.errors import CorruptCheckpoint, DoesNotFit


def note(*, log: str, name: str) -> Step:
    def step(*arguments: object) -> tuple[int, tuple[object, ...]]:
        with open(log, "a", encoding="utf-8") as file:
            file.write(name)
        return os.getpid(), arguments

    return step


def refuse(*, message: str) -> Step:
    raise CorruptCheckpoint(message)


def refuse_later(*, message: str) -> Step:
    def step() -> float:
        raise CorruptCheckpoint(message)

    return step


def break_down() -> Step:
    return lambda: 1 / 0


def vanish() -> Step:
    return lambda: os._exit(9)


def test_turns(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    workers = {name: (note, {"log": log, "name": name}) for name in "AB"}
    with Contestants(workers) as contestants:
        seconds, values = contestants.run(warmup=1, rounds=2)
        assert contestants.step("B", "decode", 3)[1][1] == ("decode", 3)
    assert Path(log).read_text() == "ABABABB"
    assert {name: len(times) for name, times in seconds.items()} == {"A": 2, "B": 2}
    pids = {name: {pid for pid, _ in value} for name, value in values.items()}
    assert len(pids["A"] | pids["B"]) == 2 and os.getpid() not in pids["A"] | pids["B"]


@pytest.mark.parametrize("worker", [refuse, refuse_later])
def test_errors_of_the_user_cross_over(worker: object) -> None:
    with (
        pytest.raises(CorruptCheckpoint, match="file x: tensor y"),
        Contestants(
            {"A": (worker, {"message": "file x: tensor y"})}  # type: ignore[dict-item]
        ) as contestants,
    ):
        contestants.step("A")


def test_faults_bring_their_traceback() -> None:
    with Contestants({"A": (break_down, {})}) as contestants, pytest.raises(RuntimeError, match="ZeroDivisionError"):
        contestants.step("A")


def test_a_killed_process_is_no_hang() -> None:
    with Contestants({"A": (vanish, {})}) as contestants, pytest.raises(DoesNotFit, match="A ended without an answer"):
        contestants.step("A")


def test_ratios_are_of_rounds() -> None:
    """Two contestants that slow down together keep their ratio, whatever their medians do."""
    slow, fast = [2.0, 8.0, 32.0], [1.0, 4.0, 16.0]
    assert ratios(slow, fast) == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_machine() -> None:
    found = machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_bytes"] > 1 << 20
