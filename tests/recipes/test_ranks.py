"""Fine-tuning on two processes does what one does: the same losses, norms and files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from qnext.checkpoint.check import read_layout
from qnext.engine import SamplingParams
from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.parallel.train.ranks import Division
from qnext.recipes.adapted import AdapterTask
from qnext.recipes.gspo import GspoData
from qnext.recipes.reason import STAGES, prepare_stage, stages_left
from qnext.recipes.rollouts import Answer, Problem, draw_answers
from qnext.recipes.tasks import prepare_task, task_of
from qnext.recipes.tuning import TuningData
from qnext.training.ranks import ALONE, TrainingRanks
from tests.recipes.test_distill import teacher as teacher
from tests.text_folders import INSTRUCT_TEMPLATE, save_tiny
from tests.training.ranked import TrainingProcesses, processes

SETTINGS = (
    *("lr=3e-3", "tokens_per_batch=64", "sequence_length=48", "precision=float32", "accumulation=4", "total_steps=2"),
    *("eval_every=2", "held_out=0.3", "balance_coefficient=0.01"),
)
WAYS: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft with an adapter": {"adapter": AdapterTask(rank=2, router=True)},
    "sft with an examination": {"examines": True},
    "dpo": {"method": "dpo"},
    "distill": {"method": "distill"},
    "distill on-policy": {"method": "on-policy"},
    "gspo": {"method": "gspo"},
    "sft, experts dealt": {"division": Division(expert=2)},
    "sft with an examination, experts dealt": {"examines": True, "division": Division(expert=2)},
    "dpo, experts dealt": {"method": "dpo", "division": Division(expert=2)},
    "distill, experts dealt": {"method": "distill", "division": Division(expert=2)},
    "distill on-policy, experts dealt": {"method": "on-policy", "division": Division(expert=2)},
    # A sample in each micro batch, whose first half, of one process, is prompt alone.
    "sft, rows cut": {"division": Division(context=2), "more": ["tokens_per_batch=48"]},
    # The answers of a pair meet where both are scored.
    "dpo, rows cut": {"method": "dpo", "division": Division(context=2)},
    "distill, rows cut": {"method": "distill", "division": Division(context=2), "more": ["tokens_per_batch=48"]},
    "sft with an adapter, rows cut": {"adapter": AdapterTask(rank=2, router=True), "division": Division(context=2)},
}
SLOW = {
    *("sft with an examination, experts dealt", "distill, experts dealt", "distill on-policy, experts dealt"),
}
ROLLOUTS = (
    *("lr=1e-3", "prompts=3", "group_size=4", "max_tokens=6", "minibatches=2", "held_out=0.3", "eval_problems=3"),
    *("accumulation=2", "total_steps=3", "eval_every=3"),
)


@pytest.fixture(scope="module")
def two() -> Iterator[TrainingProcesses]:
    with processes(2) as found:
        yield found


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("samples")
    chats = [{"prompt": f"{7 * i}?", "completion": "yes " * (1 + i % 5)} for i in range(12)]
    pairs = [{"prompt": f"{i}?", "chosen": "yes " * (1 + i % 3), "rejected": "no"} for i in range(12)]
    problems = [{"prompt": f"{n}+1", "answer": n + 1} for n in range(8)]
    for name, values in (("chats", chats), ("pairs", pairs), ("problems", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in values))
    of = {"sft": "chats", "dpo": "pairs", "distill": "chats", "on-policy": "chats", "gspo": "problems"}
    return {method: folder / f"{name}.jsonl" for method, name in of.items()}


def generous(data: GspoData, problem: Problem, answer: Answer) -> float:
    """A reward that random answers get now and then."""
    return float(sum(answer.token_ids) % 7)


@dataclass(frozen=True)
class ExaminedAnswer:
    """How likely the likeliest answer to a question is."""

    likelihood: float


def examination(data: TuningData, tokenizer: Path) -> Callable[[CausalLM], ExaminedAnswer]:
    def examine(model: CausalLM) -> ExaminedAnswer:
        params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0)
        (answer,) = draw_answers(model, [[1, 2, 3]], [params], end_ids=frozenset())
        return ExaminedAnswer(sum(token.logprob for token in answer.sampled))

    return examine


def tuned(ranks: TrainingRanks, task: dict[str, Any], out: Path, until_step: int | None = None) -> list[str]:
    """Train; with `until_step` to there, with a snapshot. The names of what is trained."""
    asked = {name: value for name, value in task.items() if name not in ("examines", "division", "more")}
    options: dict[str, Any] = {"examination": examination} if "examines" in task else {}
    run = prepare_task(task_of(out, **asked), out, resume=task.get("resume", False), ranks=ranks, **options)
    with mock.patch.object(GspoData, "reward", generous):
        run.trainer.evaluate()
        run.trainer.run(until_step=until_step)
    if until_step is not None:
        run.trainer.save()
    run.save()
    return list(run.trainer.part_of)


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an MTP layer."""
    return save_tiny(tmp_path_factory.mktemp("drafting") / "chat", chat_template=INSTRUCT_TEMPLATE, drafts=True)


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW)) for way in WAYS])
def test_two_processes_tune_as_one(
    tmp_path: Path,
    base: Path,
    drafting: Path,
    teacher: Path,
    samples: dict[str, Path],
    two: TrainingProcesses,
    way: str,
) -> None:
    """The last step of a run with an adapter is made by one process, which goes on from the snapshot of two."""
    base = drafting if "rows cut" in way else base
    method = WAYS[way].get("method", "sft")
    settings = [*(ROLLOUTS if method == "gspo" else SETTINGS)]
    settings += [f"teacher={teacher}"] if method in ("distill", "on-policy") else []
    settings += ["max_tokens=8"] if method == "on-policy" else []
    settings += WAYS[way].get("more", [])
    task = {"method": "sft", "base": str(base), "data": [str(samples[method])], "settings": settings, **WAYS[way]}
    changes_hands = "adapter" in task
    division = task.get("division", Division())
    trained = two.divided(division).run(tuned, task, tmp_path / "two", 1 if changes_hands else None)
    assert trained[0] == trained[1] == tuned(ALONE, task, tmp_path / "one")
    if changes_hands:
        tuned(ALONE, {"base": None, "data": [], "resume": True}, tmp_path / "two")
    one, other = (numbers(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(other) > 5
    for place, numbers_ in one.items():
        assert other[place] == pytest.approx(numbers_, rel=2e-6), place
    kind = "adapter" if "adapter" in task else "model"
    for file in (tmp_path / "one" / kind).glob("*.safetensors"):
        found = load_file(tmp_path / "two" / kind / file.name)
        for name, weight in load_file(file).items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def numbers(run: Path) -> dict[str, float]:
    """What stands in the metrics file of losses, norms and evaluations."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        document = json.loads(line)
        for key, value in {**document, **document.get("evaluation", {})}.items():
            if isinstance(value, float) and key not in ("elapsed", "tokens_per_second", "lr"):
                found[f"{document['step']}/{key}"] = value
    return found


def reasoned(ranks: TrainingRanks, out: Path, settings: list[str]) -> list[str]:
    """The stages that were left, each of which has run."""
    left = stages_left(out, resume=out.exists(), ranks=ranks)
    for name in left:
        stage = prepare_stage(name, out, seed=0, settings=settings, resume=True, ranks=ranks)
        stage.trainer.evaluate()
        stage.trainer.run()
        stage.save()
    return left


def read_base(ranks: TrainingRanks, task: dict[str, Any], out: Path) -> int:
    """The bytes that this process reads of the base."""
    told: dict[str, int] = {}

    @contextmanager
    def progress(what: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: told.update({what: total})

    prepare_task(task_of(out, **task), out, ranks=ranks, progress=progress)
    return told["loading"]


def test_each_process_reads_its_part_of_the_base(
    tmp_path: Path, base: Path, samples: dict[str, Path], two: TrainingProcesses
) -> None:
    """By rows and by experts; under an adapter all of it. The reference of parts is known to be that of the whole."""
    size = sum(info.num_bytes for info in read_layout(base).index.tensors.values())
    adapter = AdapterTask(rank=2)
    cases = [("sft", Division(), None), ("dpo", Division(expert=2), None), ("sft", Division(), adapter)]
    for number, (method, division, adapted) in enumerate(cases):
        task: dict[str, Any] = {"method": method, "base": str(base), "data": [str(samples[method])]}
        task |= {"settings": list(SETTINGS), "adapter": adapted}
        read = two.divided(division).run(read_base, task, tmp_path / str(number))
        assert sum(read) == (size if adapted is None else 2 * size) and max(read) < 0.6 * sum(read)
    reference = next((tmp_path / "1" / "data").glob("*.reference"))
    written = reference.stat().st_mtime_ns
    task = {"method": "dpo", "base": str(base), "data": [str(samples["dpo"])], "settings": list(SETTINGS)}
    assert read_base(ALONE, task, tmp_path / "1") == size
    assert reference.stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_model_learns_to_reason_on_two_processes(tmp_path: Path, two: TrainingProcesses) -> None:
    """As in one process that computes one micro batch after another. Then one process makes the last stage anew."""
    settings = [f"{stage}.{key}" for stage in ("pretrain", "sft") for key in ("total_steps=2", "snapshot_every=0")]
    settings += [f"{stage}.parallel_batches=1" for stage in STAGES]
    settings += [
        f"gspo.{key}" for key in ("total_steps=2", "prompts=2", "group_size=2", "max_tokens=4", "eval_every=0")
    ]
    settings += ["gspo.eval_problems=4"]
    stages = reasoned(ALONE, tmp_path / "one", settings)
    assert two.run(reasoned, tmp_path / "two", settings) == [stages, stages]
    for stage in stages:
        one, other = (numbers(tmp_path / name / stage) for name in ("one", "two"))
        assert len(one) == len(other) > 5
        for place, number in one.items():
            assert other[place] == pytest.approx(number, rel=2e-6), (stage, place)
    with pytest.raises(UsageError, match="holds a run already"):
        stages_left(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / stages[-1])
    assert reasoned(ALONE, tmp_path / "two", settings) == stages[-1:]


def test_experts_under_an_adapter_are_not_dealt(
    tmp_path: Path, base: Path, samples: dict[str, Path], two: TrainingProcesses
) -> None:
    task = {"base": str(base), "data": [str(samples["sft"])], "adapter": AdapterTask(rank=2), "settings": []}
    with pytest.raises(UsageError, match="--expert-parallel: with an adapter every process has all experts"):
        two.divided(Division(expert=2)).run(tuned, task, tmp_path / "run")


def test_rows_are_not_cut_where_a_teacher_is_asked_on_the_way(
    tmp_path: Path, base: Path, teacher: Path, samples: dict[str, Path], two: TrainingProcesses
) -> None:
    task = {"method": "on-policy", "base": str(base), "data": [str(samples["on-policy"])]}
    with pytest.raises(UsageError, match="--context-parallel: a teacher that is asked on the way"):
        settings = {"settings": [f"teacher={teacher}"]}
        two.divided(Division(context=2)).run(tuned, task | settings, tmp_path / "run")


def test_a_step_that_cannot_be_divided_is_refused(
    tmp_path: Path, base: Path, samples: dict[str, Path], two: TrainingProcesses
) -> None:
    task = {"base": str(base), "data": [str(samples["sft"])], "settings": ["accumulation=3"]}
    with pytest.raises(UsageError, match="accumulation=3: the micro batches of a step are divided among 2 processes"):
        two.run(tuned, task, tmp_path / "run")
