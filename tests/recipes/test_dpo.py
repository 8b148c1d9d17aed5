"""From files of pairs to a folder that prefers the chosen answers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from qnext.checkpoint.snapshot import list_snapshots
from tests.recipes.test_sft import metrics, run

QUICK = ("lr=1e-2", "tokens_per_batch=128", "sequence_length=64", "eval_every=0", "held_out=0", "beta=0.5")


def dpo(*arguments: str, settings: tuple[str, ...] = ()) -> int:
    return run("train", "dpo", *arguments, *(part for each in settings for part in ("--set", each)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    values = [
        {"prompt": "a?", "chosen": "Yes.", "rejected": "No, or perhaps."},
        {"prompt": "b?", "chosen": "No.", "rejected": "Yes."},
        {"prompt": "c?", "chosen": "Same.", "rejected": "Same."},
        {"prompt": "d?", "chosen": "Short.", "rejected": "Long." * 99},
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_a_model_learns_to_prefer_and_a_resumed_run_is_the_same(
    tmp_path: Path, base: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    settings = (*QUICK, "total_steps=12", "snapshot_every=6", "keep_snapshots=9")
    for out in (straight, cut):
        assert dpo("--from", str(base), "--data", str(pairs), "--out", str(out), settings=settings) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(out / "model") for out in (straight, cut)]
    assert "4 answers" in printed.err and "nothing to learn: " in printed.err and "too long: " in printed.err
    found = metrics(straight)
    first, last = (line["other_losses"] for line in (found[0], found[-1]))
    assert math.isclose(found[0]["loss"], math.log(2), rel_tol=1e-4) and abs(first["margin"]) < 1e-3  # type: ignore[arg-type,index]
    assert found[-1]["loss"] < 0.3 and last["right"] == 1.0 and last["margin"] > 1.0  # type: ignore[operator,index]
    shutil.rmtree(cut / "model")
    shutil.rmtree(list_snapshots(cut / "snapshots")[-1])
    reference = next((cut / "data").glob("*.reference"))
    kept = reference.stat().st_mtime_ns
    assert dpo("--out", str(cut), "--resume") == 0
    assert "resumed at step 6" in capsys.readouterr().err
    assert reference.stat().st_mtime_ns == kept, "the reference is not asked again"
    assert metrics(straight) == metrics(cut)
    names = ("model.safetensors", "config.json")
    assert all((straight / "model" / name).read_bytes() == (cut / "model" / name).read_bytes() for name in names)
    assert run("train", "sft", "--out", str(cut), "--resume") == 2
    assert "holds a run of dpo, not of sft" in capsys.readouterr().err


def test_an_adapter_learns_to_prefer(
    tmp_path: Path, base: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference is the base: what was scored before the adapter came."""
    out = tmp_path / "run"
    settings = (*QUICK, "total_steps=8", "snapshot_every=0")
    command = ("--from", str(base), "--data", str(pairs), "--out", str(out), "--lora", "all")
    assert dpo(*command, settings=settings) == 0
    assert capsys.readouterr().out.strip() == str(out / "adapter")
    found = metrics(out)
    assert math.isclose(found[0]["loss"], math.log(2), rel_tol=1e-4)  # type: ignore[arg-type]
    assert found[-1]["loss"] < found[0]["loss"]  # type: ignore[operator]


def test_held_out_pairs_are_judged(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "many.jsonl", tmp_path / "run"
    values = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(12)]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    settings = (*QUICK, "held_out=0.5", "total_steps=6", "snapshot_every=0", "by_length=true")
    assert dpo("--from", str(base), "--data", str(path), "--out", str(out), settings=settings) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "held-out loss" in line]
    assert "step 0: held-out loss 0.6931, margin" in lines[0] and "preferred in 100.0%" in lines[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("beta=0",), "beta must be above zero, not 0.0"),
        (("taught=last",), "--set taught: unknown"),
        (("sequence_length=4",), "nothing to learn from in it"),
        (("tokens_per_batch=9",), "longer than a batch"),
    ],
)
def test_faults_of_the_user_are_one_line(
    tmp_path: Path, base: Path, pairs: Path, capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], message: str
) -> None:
    assert dpo("--from", str(base), "--data", str(pairs), "--out", str(tmp_path / "run"), settings=settings) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("qnext train-dpo: ")


def test_samples_that_are_no_pairs_are_named_by_their_line(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "a?", "completion": "Yes."}\n')
    assert dpo("--from", str(base), "--data", str(path), "--out", str(tmp_path / "run")) == 2
    assert "chats.jsonl:1: a pair needs chosen and rejected" in capsys.readouterr().err
