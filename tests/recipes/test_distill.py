"""From a teacher and files of chats and texts to a student that says what the teacher says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qnext.checkpoint import save_model
from qnext.checkpoint.snapshot import list_snapshots
from qnext.config import ModelConfig
from qnext.model import CausalLM, initialize
from qnext.training import teacher as teacher_files
from tests.recipes.test_sft import metrics, run
from tests.text_folders import save_plain, tiny_config

QUICK = ("lr=1e-2", "tokens_per_batch=96", "sequence_length=64", "precision=float32", "eval_every=0", "held_out=0")


def distill(*arguments: str, settings: tuple[str, ...] = ()) -> int:
    return run("train", "distill", *arguments, *(part for each in settings for part in ("--set", each)))


def save_like(base: Path, folder: Path, config: ModelConfig) -> Path:
    """Another model with the tokenizer of `base`."""
    model = CausalLM(config)
    initialize(model, seed=9)
    save_model(model, folder, tokenizer_folder=base)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Dense, and of other sizes than the student."""
    config = tiny_config(280, eos_token_id=258).with_(num_experts=0, intermediate_size=40, hidden_size=32)
    return save_like(base, tmp_path_factory.mktemp("teacher") / "dense", config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> tuple[str, ...]:
    """A file of chats and a text: a shard of each, so two files of answers at least."""
    text = tmp_path_factory.mktemp("text") / "some.txt"
    text.write_text("It is what it is. " * 12)
    return ("--data", str(chats), "--data", str(text))


@pytest.mark.parametrize("kept", ["sampled", "top"])
def test_a_student_learns_what_the_teacher_says_and_a_resumed_run_is_the_same(
    tmp_path: Path, base: Path, teacher: Path, data: tuple[str, ...], kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    settings = (*QUICK, f"kept={kept}", "total_steps=16", "snapshot_every=8", "keep_snapshots=9", "temperature=1.5")
    student, asked = (base, teacher) if kept == "sampled" else (teacher, base)  # sparse and dense, and the reverse
    command = ("--from", str(student), "--teacher", str(asked), *data)
    for out in (straight, cut):
        assert distill(*command, "--out", str(out), settings=settings) == 0
    assert capsys.readouterr().out.split() == [str(out / "model") for out in (straight, cut)]
    found = metrics(straight)
    first, last = (line["other_losses"]["teacher"] for line in (found[0], found[-1]))  # type: ignore[index]
    assert last < 0.6 * first
    shutil.rmtree(cut / "model")
    shutil.rmtree(list_snapshots(cut / "snapshots")[-1])
    times = {path: path.stat().st_mtime_ns for path in (cut / "data").glob("*.answers")}
    assert len(times) == 2
    assert distill("--out", str(cut), "--resume") == 0
    assert "resumed at step 8" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in times} == times, "the teacher is not asked again"
    assert metrics(straight) == metrics(cut)
    names = ("model.safetensors", "config.json")
    assert all((straight / "model" / name).read_bytes() == (cut / "model" / name).read_bytes() for name in names)


def test_damaged_answers_are_named_and_asked_for_again(
    tmp_path: Path,
    base: Path,
    teacher: Path,
    data: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nothing is damaged the teacher is not even read."""
    out, settings = tmp_path / "run", (*QUICK, "total_steps=1", "snapshot_every=1")
    assert distill("--from", str(base), "--teacher", str(teacher), *data, "--out", str(out), settings=settings) == 0
    one, two = sorted((out / "data").glob("*.answers"))
    whole = one.read_bytes()
    one.write_bytes(whole[:-7])
    kept = two.stat().st_mtime_ns
    capsys.readouterr()
    assert distill("--out", str(out), "--resume") == 0
    assert f"{one}: damaged; it is made again" in capsys.readouterr().err
    assert one.read_bytes() == whole and two.stat().st_mtime_ns == kept
    monkeypatch.setattr("qnext.recipes.distill.load_weights", None)
    monkeypatch.setattr(teacher_files, "write_arrays", None)
    assert distill("--out", str(out), "--resume") == 0


def test_an_adapter_and_the_routers_are_taught(
    tmp_path: Path, base: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_like(base, tmp_path / "teacher", tiny_config(280, eos_token_id=258))
    command = ("--from", str(base), "--teacher", str(other), *data, "--out", str(tmp_path / "run"))
    settings = (*QUICK, "router_coefficient=1", "budget=200", "total_steps=8", "snapshot_every=0", "held_out=0.3")
    assert distill(*command, "--lora", "all", "--router", settings=settings) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "run" / "adapter")
    assert "divergence from the teacher" in printed.err
    first, *_, last = (line["other_losses"]["router"] for line in metrics(tmp_path / "run"))  # type: ignore[index]
    assert 0 < last < first


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "message"),
    [
        (("--from", "BASE", "--data", "DATA"), (), 2, "--teacher MODEL is missing"),
        (("--from", "BASE", "--teacher", "nowhere", "--data", "DATA"), (), 3, "nowhere"),
        (
            ("--from", "BASE", "--teacher", "OTHER", "--data", "DATA"),
            (),
            2,
            "OTHER has another vocabulary than the student: 1",
        ),
        (
            ("--from", "BASE", "--teacher", "TEACHER", "--data", "DATA"),
            ("share=2",),
            2,
            "share must be between 0 and 1",
        ),
        (("--from", "BASE", "--teacher", "TEACHER", "--data", "DATA"), ("kept=all",), 2, "kept must be one of top, "),
        (
            ("--from", "BASE", "--teacher", "TEACHER", "--data", "DATA"),
            ("budget=3",),
            2,
            "a budget of 3 bytes per token",
        ),
        (
            ("--from", "BASE", "--teacher", "TEACHER", "--data", "DATA"),
            ("router_coefficient=1",),
            2,
            "the student has 2 routers of 4 experts, TEACHER 0 of 0; only equal ones can be compared",
        ),
        (("--resume", "--teacher", "TEACHER"), (), 2, "--resume takes --teacher and --on-policy from the run"),
    ],
)
def test_faults_of_the_user_are_one_line(
    tmp_path: Path,
    base: Path,
    teacher: Path,
    chats: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    settings: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    other = tmp_path / "other"
    if "OTHER" in arguments:
        save_plain(other)
        for file in other.glob("*token*.json"):
            file.write_text(file.read_text(encoding="utf-8").replace("<tool_call>", "<tool_kall>"), encoding="utf-8")
    named = {"BASE": str(base), "TEACHER": str(teacher), "OTHER": str(other), "DATA": str(chats)}
    out = tmp_path / "run"
    assert distill(*(named.get(each, each) for each in arguments), "--out", str(out), settings=settings) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    for name, path in named.items():
        message = message.replace(name, path)
    assert message in line and line.startswith("qnext train-distill: ")
    assert not list(out.glob("data/*.answers"))
