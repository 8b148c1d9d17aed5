"""A run that is killed at any moment loses only the steps after its last snapshot: the same losses, bit by bit."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from qnext.checkpoint.snapshot import list_snapshots
from tests.forked import Program
from tests.recipes.test_sft import metrics
from tests.text_folders import save_chat

SETTINGS = (
    "lr=1e-2",
    "tokens_per_batch=60",
    "sequence_length=60",
    "precision=float32",
    "total_steps=8",
    "snapshot_every=1",
    "eval_every=0",
    "held_out=0",
)


class Driver:
    """Commands in processes of their own, which may be killed after some seconds."""

    def __init__(self, process: Program) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._in: IO[str] = process.stdin
        self._out: IO[str] = process.stdout

    def run(self, *arguments: str, file: Path | None = None, lines: int = 0, seconds: float = 0.0) -> int | None:
        """The exit code; None where it was killed, so many seconds after the file had so many lines."""
        self._in.write(json.dumps([None if file is None else str(file), lines, seconds, *arguments]) + "\n")
        self._in.flush()
        return json.loads(self._out.readline())


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with Program(["-m", "tests.recipes.killed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Driver(process)
        assert process.stdin is not None
        process.stdin.close()


class Straight:
    """A run that nobody kills."""

    method = "sft"
    answer = "completion"
    settings: tuple[str, ...] = SETTINGS

    def __init__(self, driver: Driver, folder: Path) -> None:
        base = save_chat(folder / "base")
        data = folder / "samples.jsonl"
        samples = [{"prompt": f"{n}?", self.answer: f"It is {n}."} for n in range(40)]
        data.write_text("".join(json.dumps(each) + "\n" for each in samples))
        settings = [part for each in self.settings for part in ("--set", each)]
        self.begin = ["train", self.method, "--from", str(base), "--data", str(data), *settings, "--out"]
        self.folder = folder / "straight"
        assert driver.run(*self.begin, str(self.folder)) == 0

    def command(self, out: Path) -> list[str]:
        """What a user types who finds the run as it is: the first command where nothing was kept, else --resume."""
        if list_snapshots(out / "snapshots"):
            return ["train", self.method, "--resume", "--out", str(out)]
        return [*self.begin, str(out)]


class Rewarded(Straight):
    """A run of GSPO with two updates by each draw. No answer of its model is right: the routers alone learn."""

    method = "gspo"
    answer = "answer"
    settings = (
        *("lr=1e-2", "balance_coefficient=0.1", "total_steps=8", "snapshot_every=1", "eval_every=0"),
        *("prompts=2", "group_size=2", "minibatches=2", "max_tokens=6"),
    )


@pytest.fixture(scope="module")
def straight(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(driver, tmp_path_factory.mktemp("killed"))


def test_killed_while_the_teacher_is_asked(driver: Driver, straight: Straight, tmp_path: Path) -> None:
    """As soon as a file of answers is there, of three: what it had said stays, and the rest comes out the same."""
    base, teacher = (straight.folder.parent / name for name in ("base", "teacher"))
    save_chat(teacher)
    data = []
    for name, times in (("one", 40), ("two", 30), ("three", 20)):
        (tmp_path / name).write_text(f"This is {name}. " * times)
        data += ["--data", str(tmp_path / name)]
    settings = [part for each in ("total_steps=2", *SETTINGS[:4], *SETTINGS[5:]) for part in ("--set", each)]
    begin = ["train", "distill", "--from", str(base), "--teacher", str(teacher), *data, *settings, "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert driver.run(*begin, str(whole)) == 0
    answers = sorted((whole / "data").glob("*.answers"), key=lambda path: path.stat().st_mtime_ns)
    assert len(answers) == 3
    num_killed, kept = 0, dict[str, int]()
    for path in answers:
        num_killed += driver.run(*begin, str(cut), file=cut / "data" / path.name) is None
        now = {path.name: path.stat().st_mtime_ns for path in (cut / "data").glob("*.answers")}
        assert kept.items() <= now.items(), "what was there is not asked again"
        kept = now
    assert num_killed
    assert driver.run("train", "distill", "--resume", "--out", str(cut)) == 0
    for path in [*answers, whole / "model" / "model.safetensors"]:
        assert path.read_bytes() == (cut / path.relative_to(whole)).read_bytes()
    assert not [path for path in cut.rglob(".*") if ".partial" in path.name]


def kill_and_go_on(driver: Driver, straight: Straight, out: Path, source: random.Random, *, times: int) -> int:
    """How often it was killed indeed."""
    num_killed, newest = 0, 0
    for _ in range(times):
        # After a step that is still to come, or as soon as the folder of the tokenizer is there.
        at, pause = source.randint(newest, max(newest, 6)), source.uniform(0.0, 0.03)
        file = out / ("metrics.jsonl" if at else "tokenizer/tokenizer_config.json")
        code = driver.run(*straight.command(out), file=file, lines=at, seconds=pause)
        num_killed += code is None
        assert code in (None, 0)
        kept = [int(path.name.removeprefix("step-")) for path in list_snapshots(out / "snapshots")]
        assert max(kept, default=0) >= newest, "a snapshot was lost"
        newest = max(kept, default=0)
        if code == 0:
            break
    assert driver.run(*straight.command(out)) == 0
    assert metrics(out) == metrics(straight.folder)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (out / "model" / name).read_bytes() == (straight.folder / "model" / name).read_bytes(), name
    hidden = [path for path in out.rglob(".*") if ".partial" in path.name]
    assert not hidden
    return num_killed


def kill_often(driver: Driver, straight: Straight, folder: Path, source: random.Random, *, times: int) -> None:
    """A run that comes to its end begins anew."""
    while times > 0:
        shutil.rmtree(folder / "run", ignore_errors=True)
        times -= kill_and_go_on(driver, straight, folder / "run", source, times=times)


def test_killed_at_8_random_moments(driver: Driver, straight: Straight, tmp_path: Path) -> None:
    kill_often(driver, straight, tmp_path, random.Random(5), times=8)


@pytest.mark.slow
def test_killed_while_it_learns_from_rewards(driver: Driver, tmp_path: Path) -> None:
    """In the middle of a draw too: what of it is not learnt yet stands in the snapshot."""
    kill_often(driver, Rewarded(driver, tmp_path), tmp_path, random.Random(3), times=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_200_random_moments(driver: Driver, straight: Straight, tmp_path: Path, seed: int) -> None:
    kill_often(driver, straight, tmp_path, random.Random(seed), times=10)
