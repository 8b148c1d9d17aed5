"""From problems with known answers to a folder that answers them more often; and the way there from random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qnext.checkpoint.snapshot import list_snapshots
from qnext.errors import UsageError
from qnext.recipes.gspo import GspoData
from qnext.recipes.rewards import REWARDS, final_answer, queries_of
from qnext.recipes.rollouts import Answer, Problem
from qnext.recipes.sums import exercises
from tests.recipes.test_sft import metrics, run

QUICK = ("lr=1e-2", "prompts=2", "group_size=4", "max_tokens=6", "minibatches=2", "held_out=0.3", "eval_problems=3")


def gspo(*arguments: str, settings: tuple[str, ...] = ()) -> int:
    return run("train", "gspo", *arguments, *(part for each in settings for part in ("--set", each)))


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    asked = [{"prompt": f"{n}+1", "answer": n + 1} for n in range(8)]
    chats = [{"messages": [{"role": "user", "content": f"{n}-1"}], "answer": str(n - 1)} for n in range(1, 4)]
    path.write_text("".join(json.dumps(each) + "\n" for each in (*asked, *chats)))
    return path


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that random answers get now and then."""

    def reward(data: GspoData, problem: Problem, answer: Answer) -> float:
        return float(sum(answer.token_ids) % 7)

    monkeypatch.setattr(GspoData, "reward", reward)


@pytest.mark.usefixtures("generous")
def test_a_model_learns_from_rewards_and_a_resumed_run_is_the_same(
    tmp_path: Path, base: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    settings = (*QUICK, "total_steps=5", "snapshot_every=3", "keep_snapshots=9", "eval_every=0")
    for out in (straight, cut):
        assert gspo("--from", str(base), "--data", str(problems), "--out", str(out), settings=settings) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(out / "model") for out in (straight, cut)]
    assert "held out; reward: exact" in printed.err and "held-out reward" in printed.err
    found = metrics(straight)
    steps = [line["other_losses"] for line in found if "other_losses" in line]
    assert all({"entropy", "clipped"} <= each.keys() for each in steps)  # type: ignore[attr-defined]
    assert found[1]["grad_norm"] > 0.0  # type: ignore[operator]
    names = {"reward", "length", "dropped", "mismatch", "mismatch_max", "mismatch_kl", "routing_differs"}
    assert [names <= each.keys() for each in steps] == [True, False, True, False, True]  # type: ignore[attr-defined]
    shutil.rmtree(cut / "model")
    shutil.rmtree(list_snapshots(cut / "snapshots")[-1])
    assert gspo("--out", str(cut), "--resume") == 0
    assert "resumed at step 3" in capsys.readouterr().err
    assert metrics(straight) == metrics(cut)
    names_of_files = ("model.safetensors", "config.json")
    assert all((straight / "model" / n).read_bytes() == (cut / "model" / n).read_bytes() for n in names_of_files)


@pytest.mark.usefixtures("generous")
def test_an_adapter_learns_from_rewards_beside_a_reference(
    tmp_path: Path, base: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = (*QUICK, "total_steps=3", "snapshot_every=0", "kl=0.1")
    command = ("--from", str(base), "--data", str(problems), "--out", str(out), "--lora", "attention")
    assert gspo(*command, settings=settings) == 0
    assert capsys.readouterr().out.strip() == str(out / "adapter")
    steps = [line["other_losses"] for line in metrics(out) if "other_losses" in line]
    assert abs(steps[0]["kl"]) < 1e-6 < steps[1]["kl"]  # type: ignore[index]


@pytest.mark.usefixtures("generous")
def test_a_mismatch_above_the_limit_ends_the_run_with_one_line(
    tmp_path: Path, base: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes that no kernel serves: PyTorch's results depend on the batch."""
    out = tmp_path / "run"
    settings = (*QUICK, "total_steps=9", "snapshot_every=1", "max_mismatch=0")
    assert gspo("--from", str(base), "--data", str(problems), "--out", str(out), settings=settings) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        last.startswith("qnext train-gspo: a token of a rollout has a log-probability") and "max_mismatch is 0" in last
    )


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), (), "either --task NAME or --data FILE"),
        (("--task", "sum"), (), "task must be one of sums, not 'sum'"),
        (("--task", "sums", "--reward", "vague"), (), "reward must be one of exact, numeric"),
        (("--task", "sums"), ("group_size=1",), "group_size must be at least 2"),
        (("--task", "sums"), ("tokens_per_batch=9",), "tokens_per_batch: does not go together with rollouts"),
        (("--task", "sums"), ("max_tokens=999",), "no problem is left"),
    ],
)
def test_faults_of_the_user_are_one_line(
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    settings: tuple[str, ...],
    message: str,
) -> None:
    assert gspo("--from", str(base), *arguments, "--out", str(tmp_path / "run"), settings=settings) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a?"}', "a problem needs an answer"),
        ('{"answer": "b"}', "needs either prompt or messages"),
        ('{"prompt": [], "answer": "b"}', "prompt must be a text or messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}', ":1: "),
    ],
)
def test_what_is_no_problem_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=message) as raised:
        queries_of(path)
    assert "problems.jsonl:1: " in str(raised.value)


def test_rewards() -> None:
    exact, numeric = REWARDS["exact"], REWARDS["numeric"]
    assert exact("12", "12") == 1.0 and exact("12.", "12") == 0.0
    assert numeric("It is 1,012.50 then.", "1012.5") == 1.0 and numeric("-3", "3") == 0.0
    assert numeric("none", "3") == 0.0 and numeric("", "") == 0.0
    assert final_answer("7+8=15\n</think>\n\n15", is_thinking=True) == "15"
    assert final_answer("15", is_thinking=True) is None and final_answer(" 15", is_thinking=False) == "15"


def test_workings_of_a_careful_hand_are_right() -> None:
    careful, careless = exercises(300, seed="a"), exercises(300, seed="a", care=0.0)
    assert all(each.answer == each.truth for each in careful)
    wrong = [each for each in careless if each.answer != each.truth]
    assert 240 < len(wrong) < 300 and all("+0=" in each.thought for each in wrong)


def test_the_way_from_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All stages, a few steps each; the second one is interrupted by its end and the run goes on."""
    out = tmp_path / "run"
    short = [f"{stage}.{key}" for stage in ("pretrain", "sft") for key in ("total_steps=2", "snapshot_every=1")]
    short += ["gspo.total_steps=2", "gspo.prompts=2", "gspo.group_size=2", "gspo.eval_problems=4", "gspo.max_tokens=4"]
    settings = [part for each in short for part in ("--set", each)]
    assert run("train", "reason", "--out", str(out), *settings) == 0
    models = [str(out / stage / "model") for stage in ("pretrain", "sft", "gspo")]
    assert capsys.readouterr().out.split() == models
    first = metrics(out / "gspo")[0]["other_losses"]
    assert first["mismatch_max"] == first["routing_differs"] == 0.0  # type: ignore[index]
    assert json.loads((out / "gspo" / "task.json").read_text())["settings"][0] == "task=sums"
    expected = (out / "gspo" / "model" / "model.safetensors").read_bytes()
    assert run("train", "reason", "--out", str(out), *settings) == 2
    for stage in ("sft", "gspo"):
        shutil.rmtree(out / stage / "model")
    shutil.rmtree(out / "gspo")
    capsys.readouterr()
    assert run("train", "reason", "--out", str(out), "--resume", *settings) == 0
    assert capsys.readouterr().out.split() == models[1:]
    assert (out / "gspo" / "model" / "model.safetensors").read_bytes() == expected
    assert run("train", "reason", "--out", str(tmp_path / "other"), "--set", "lr=1") == 2
    assert "expected pretrain.key=value" in capsys.readouterr().err
