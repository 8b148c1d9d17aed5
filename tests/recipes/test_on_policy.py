"""From prompts and a teacher to a student that writes as the teacher does: it writes, and the teacher corrects."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qnext.checkpoint import load_model
from qnext.checkpoint.snapshot import list_snapshots
from qnext.recipes.on_policy import AnswerWriting, PromptKind, WrittenSource, answered, prompt_of, written
from qnext.recipes.rollouts import draw_answers
from qnext.training.data import IGNORED
from qnext.training.samples import SampleSet, SampleStream
from tests.recipes.test_distill import distill, save_like
from tests.recipes.test_sft import metrics, run
from tests.text_folders import tiny_config

QUICK = ("lr=1e-2", "tokens_per_batch=128", "sequence_length=64", "precision=float32", "eval_every=0", "held_out=0")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "chats.jsonl"
    values = [{"prompt": f"{n}?", "completion": "Not read."} for n in range(12)]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_a_prompt_is_what_stands_before_the_last_answer() -> None:
    assert prompt_of(np.array([~5, 6, 7, ~8, ~9, 3, 4])) == [5, 6, 7, 8, 9]
    assert prompt_of(np.array([~5, 6, 7, 8, 9])) == [5, 6], "of a text its first half"
    assert prompt_of(np.array([~5, 6])) == [5]


def test_answers_are_the_models_own_and_alone_are_learnt(base: Path) -> None:
    """At temperature 1, to the token that ends them; the same again, and others for another seed."""
    model, prompts = load_model(base).float(), [[1, 2, 3], [4, 5]] * 20
    context = model.config.max_position_embeddings
    writer = AnswerWriting(partial(draw_answers, model), context, 30, 276, frozenset({258, 7}))
    answers = written(writer, prompts, seed=3)
    assert answers == written(writer, prompts, seed=3) != written(writer, prompts, seed=4)
    assert any(len(answer) < 30 for answer in answers)
    assert all(answer[-1] in (258, 7) or len(answer) == 30 for answer in answers)
    assert all(token not in (258, 7) for answer in answers for token in answer[:-1])
    batch = answered(writer, prompts, seed=3)
    assert batch.batch.packing.lengths == tuple(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True))
    assert batch.labels_T[batch.labels_T != IGNORED].tolist() == [token for answer in answers for token in answer]
    few = answered(writer._replace(num_tokens=100), prompts, seed=3)
    assert few.labels_T.max() < 100 and few.num_labels < batch.num_labels


def test_the_same_prompt_is_answered_anew_and_a_place_is_found_again(base: Path) -> None:
    document = np.array([~1, ~2, ~3, 9], dtype=np.int32)
    options = {"tokens_per_batch": 80, "seed": 0, "fingerprint": ""}
    prompts = SampleStream([SampleSet([[document]], kind=PromptKind(20))], **options)  # type: ignore[arg-type]
    model = load_model(base).float()
    context = model.config.max_position_embeddings
    source = WrittenSource(AnswerWriting(partial(draw_answers, model), context, 20, 276, frozenset({258})), prompts)
    first, place = source.next_batch(), source.position
    second = source.next_batch()
    answers = [batch.batch.token_ids_T.tolist() for batch in (first, second)]
    assert first.num_labels > 20, "several prompts fit"
    assert answers[0] != answers[1]
    source.seek(place)
    assert source.next_batch().batch.token_ids_T.tolist() == answers[1]


def test_a_student_writes_more_and_more_like_the_teacher_and_a_resumed_run_is_the_same(
    tmp_path: Path, base: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(280, eos_token_id=258).with_(num_experts=0, intermediate_size=40, hidden_size=32)
    teacher = save_like(base, tmp_path / "teacher", config)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    settings = (
        *QUICK,
        "total_steps=12",
        "snapshot_every=6",
        "keep_snapshots=9",
        "max_tokens=12",
        "held_out=0.3",
        "lr=3e-2",
    )
    command = ("--from", str(base), "--teacher", str(teacher), "--data", str(prompts), "--on-policy")
    for out in (straight, cut):
        assert distill(*command, "--out", str(out), settings=settings) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(out / "model") for out in (straight, cut)]
    assert "held-out divergence to the teacher" in printed.err
    found = metrics(straight)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]  # type: ignore[operator]
    shutil.rmtree(cut / "model")
    shutil.rmtree(list_snapshots(cut / "snapshots")[-1])
    assert distill("--out", str(cut), "--resume") == 0
    assert "resumed at step 6" in capsys.readouterr().err
    assert metrics(straight) == metrics(cut)
    names = ("model.safetensors", "config.json")
    assert all((straight / "model" / name).read_bytes() == (cut / "model" / name).read_bytes() for name in names)
    assert run("train", "sft", "--out", str(cut), "--resume") == 2
    assert "holds a run of on-policy, not of sft" in capsys.readouterr().err


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path: Path, base: Path, prompts: Path) -> None:
    """As an adapter, in fp32: the teacher computes by other kernels."""
    out = tmp_path / "run"
    command = ("--from", str(base), "--teacher", str(base), "--data", str(prompts), "--on-policy", "--lora", "all")
    settings = (*QUICK, "total_steps=2", "snapshot_every=0", "max_tokens=8", "balance_coefficient=0.1")
    assert distill(*command, "--out", str(out), settings=settings) == 0
    first, second = metrics(out)
    assert abs(first["loss"]) < 1e-5 < second["loss"]  # type: ignore[arg-type,operator]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("max_tokens=0",), "max_tokens must be at least 1, not 0"),
        (("taught=assistant",), "taught must be last"),
        (("share=0.5",), "--set share: unknown"),
        (("max_tokens=128",), "longer than a batch"),
    ],
)
def test_faults_of_the_user_are_one_line(
    tmp_path: Path,
    base: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
    settings: tuple[str, ...],
    message: str,
) -> None:
    command = ("--from", str(base), "--teacher", str(base), "--data", str(prompts), "--on-policy")
    assert distill(*command, "--out", str(tmp_path / "run"), settings=(*QUICK, *settings)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line and line.startswith("qnext train-distill: ")
