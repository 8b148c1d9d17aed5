from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from qnext.checkpoint import load_model
from qnext.cli import main
from qnext.recipes import RECIPES, Recipe, override, recipe
from qnext.text.tokenizer import Tokenizer
from qnext.training import TrainConfig
from qnext.training.sources import Corpus, TextFile
from tests.training.models import tiny_config


def tiny_recipe() -> Recipe:
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 4 for i in range(30)]
    return Recipe(
        name="tiny",
        model=tiny_config(vocab_size=300),
        train=TrainConfig(
            lr=1e-2,
            tokens_per_batch=32,
            sequence_length=16,
            total_steps=4,
            precision="float32",
            snapshot_every=2,
            eval_every=2,
        ),
        corpus=lambda: Corpus(
            [TextFile(f"{i}.py", str(i), text) for i, text in enumerate(texts[:25])],
            [TextFile(f"{i}.py", str(i), text) for i, text in enumerate(texts[25:])],
            "thirty functions",
        ),
        eval_bytes=400,
    )


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "tiny", tiny_recipe)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_what_cannot_share_its_work_is_refused_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("demo", "--out", str(tmp_path / "run")) == 2
    assert "runs in one process, and torchrun has started 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--expert-parallel", "--context-parallel"])
def test_a_division_needs_processes(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "tiny", "--out", str(tmp_path / "run"), flag, "2") == 2
    assert f"{flag} 2: start as many processes" in capsys.readouterr().err


def test_train_then_resume_then_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", "tiny", "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "model")
    assert "thirty functions" in printed.err
    assert "zero-centred norm" in printed.err and "bits per byte" in printed.err
    model = load_model(out / "model")
    tokenizer = Tokenizer.from_folder(out / "model")
    assert model.config.eos_token_ids == tuple(tokenizer.eos_ids)
    assert model.mtp is not None

    assert run("train", "tiny", "--out", str(out)) == 2
    assert "--resume" in capsys.readouterr().err

    assert run("train", "tiny", "--out", str(out), "--resume", "--set", "total_steps=6") == 0
    assert "resumed at step 4" in capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]

    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x\n")
    assert run("eval", str(out / "model"), str(text), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_bytes"] == len(text.read_bytes())
    assert 0 < result["bits_per_byte"] < 20 and 0 <= result["mtp_acceptance"] <= 1
    assert run("eval", str(out / "model"), str(text), str(text)) == 0
    assert f"{result['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_half_of_a_tokenizer_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", "tiny", "--out", str(out), "--set", "total_steps=1") == 0
    for name in ("snapshots", "model"):
        (out / name).rename(tmp_path / name)
    (out / "tokenizer" / "tokenizer_config.json").unlink()
    assert run("train", "tiny", "--out", str(out), "--resume") == 2
    assert "holds no run that could be resumed" in capsys.readouterr().err
    assert run("train", "tiny", "--out", str(out), "--set", "total_steps=1") == 0
    assert (out / "model" / "config.json").is_file()


@pytest.mark.parametrize("what", ["snapshot", "model"])
def test_a_full_disk_at_the_end_is_told_and_what_fits_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out = tmp_path / "run"
    write = os.write

    def full(file: int, data: bytes) -> int:
        place = os.readlink(f"/proc/self/fd/{file}")
        if ("step-00000004" if what == "snapshot" else ".model.partial") in place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert run("train", "tiny", "--out", str(out)) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qnext")]
    snapshots = sorted(path.name for path in (out / "snapshots").iterdir())
    if what == "snapshot":  # the one that is due after the step, and the last one
        assert lines == [
            f"qnext train: warning: {out}/snapshots/step-00000004/model.safetensors: No space left on device; "
            f"{out}/snapshots/step-00000004 was not made; the newest is step-00000002{more}"
            for more in ("; the run goes on and tries again at step 6", "")
        ]
        assert snapshots == ["step-00000002"] and load_model(out / "model") is not None
    else:
        assert len(lines) == 1 and f"{out}/model" in lines[0] and lines[0].endswith("model was not made")
        assert snapshots == ["step-00000002", "step-00000004"] and not (out / "model").exists()
    assert not [path for path in out.rglob("*") if ".partial" in path.name]
    assert run("train", "tiny", "--out", str(out), "--resume") == 0


def test_interrupt_saves_a_snapshot_and_resume_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"

    def interrupt_once_training() -> None:
        while not (metrics.exists() and metrics.stat().st_size):
            if done.wait(0.02):
                return
        signal.raise_signal(signal.SIGINT)

    done = threading.Event()
    thread = threading.Thread(target=interrupt_once_training)
    thread.start()
    try:
        arguments = ("--set", "total_steps=100000", "--set", "snapshot_every=0", "--set", "eval_every=0")
        assert run("train", "tiny", "--out", str(out), *arguments) == 130
    finally:
        done.set()
        thread.join()
    assert "snapshot saved" in capsys.readouterr().err
    (snapshot,) = (out / "snapshots").iterdir()
    step = int(snapshot.name.removeprefix("step-"))
    assert step >= 1 and not (out / "model").exists()
    assert run("train", "tiny", "--out", str(out), "--resume", "--set", f"total_steps={step + 2}") == 0
    assert f"resumed at step {step}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "nonsense"), 2, "small-code"),
        (("train", "tiny", "--set", "lr"), 2, "key=value"),
        (("train", "tiny", "--set", "speed=3"), 2, "speed"),
        (("train", "tiny", "--set", "lr=fast"), 2, "lr=fast"),
        (("train", "tiny", "--set", "optimizer=sgd"), 2, "optimizer"),
        (("train", "tiny", "--set", "model.vocab_size=10"), 2, "vocab_size 10"),
        (("train", "tiny", "--resume"), 2, "no run"),
        (("eval", "nowhere", "missing.txt"), 2, "missing.txt"),
    ],
)
def test_faults_of_the_user_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1] and "Traceback" not in "".join(errors)
    assert not (tmp_path / "runs").exists()


def test_override() -> None:
    changed = override(
        tiny_recipe(),
        [
            "time_budget=7.5",
            "accumulation=3",
            "mtp_detach_trunk=true",
            "model.num_hidden_layers=4",
            "model.num_experts=8",
        ],
    )
    assert (changed.train.time_budget, changed.train.total_steps) == (7.5, None)
    assert (changed.train.accumulation, changed.train.mtp_detach_trunk) == (3, True)
    assert (changed.model.num_hidden_layers, changed.model.num_experts) == (4, 8)
    assert override(tiny_recipe(), ["total_steps=9"]).train.total_steps == 9


@pytest.mark.parametrize("name", ["small-code", "micro-code"])
def test_recipes_are_sound(name: str) -> None:
    found = recipe(name)
    assert found.name == name
    assert found.train.sequence_length <= found.model.max_position_embeddings
    corpus = found.corpus()
    assert corpus.train and corpus.held_out
    assert not {f.package for f in corpus.train} & {f.package for f in corpus.held_out}
