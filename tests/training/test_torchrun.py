"""`torchrun -m qnext train`: the whole command, with real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qnext.checkpoint import load_model
from tests.docs.snippets import ROOT

SETTINGS = ["--set", "accumulation=4"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

pytestmark = pytest.mark.slow


def train(num_ranks: int, recipe: str, out: Path, *more: str) -> subprocess.Popen[str]:
    start = [sys.executable] if num_ranks == 1 else [*TORCHRUN, str(num_ranks)]
    command = [*start, "-m", "tests.training.tiny_cli", "train", recipe, "--out", str(out), *SETTINGS, *more]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_command_on_two_ranks_and_alone(tmp_path: Path) -> None:
    found = {}
    ways = {
        "alone": (1,),
        "two": (2,),
        "experts": (2, "--expert-parallel", "2"),
        "rows": (2, "--context-parallel", "2"),
    }
    for name, (num_ranks, *flags) in ways.items():
        process = train(num_ranks, "tiny", tmp_path / name, *flags)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.split() == [str(tmp_path / name / "model")]
        assert err.count("held-out") == 2
        found[name] = losses(tmp_path / name)
        model = load_model(tmp_path / name / "model")
        assert model.config == load_model(tmp_path / "alone" / "model").config
    assert all(each == pytest.approx(found["alone"], rel=1e-5) for each in found.values()), found


def test_a_killed_rank_is_named_once_and_the_run_goes_on(tmp_path: Path) -> None:
    process = train(2, "slow", tmp_path)
    second = _second_rank(process.pid, tmp_path / "snapshots")
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert [line for line in err.splitlines() if "was lost" in line and line.startswith("qnext train: rank 1")], err
    assert err.count("qnext train:") == 1
    assert "exitcode  : 7" in err or "exitcode: 7" in err or "Signal 9" in err
    newest = max(int(path.name[5:]) for path in (tmp_path / "snapshots").glob("step-*"))
    process = train(1, "slow", tmp_path, "--resume", "--set", f"total_steps={newest + 2}")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert f"resumed at step {newest}" in err


def _second_rank(torchrun: int, snapshots: Path) -> int:
    """The process of rank 1, once a snapshot is there."""
    while not list(snapshots.glob("step-*")):
        time.sleep(0.2)
    for children in Path(f"/proc/{torchrun}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes().replace(b"LOCAL_RANK=1\0", b""):
                return int(child)
    raise AssertionError("torchrun has no child of rank 1")
