"""A model that reasons, from random weights: pretraining, a form of thinking taught by a careless hand, and GSPO.

The texts and the taught workings mostly forget to carry, so the taught model thinks in the right form and gets most
sums wrong. GSPO is told of each answer whether it is right, and of nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qnext.config import ModelConfig, hybrid_pattern
from qnext.errors import UsageError
from qnext.files import write_file
from qnext.recipes.recipe import Recipe, is_run, override, prepare
from qnext.recipes.rewards import is_held_out, sum_of
from qnext.recipes.sums import Exercise, exercises
from qnext.recipes.tasks import prepare_task
from qnext.recipes.tuning_task import TuningTask
from qnext.training import Hooks, TrainConfig, Trainer
from qnext.training.ranks import ALONE, TrainingRanks
from qnext.training.sources import Corpus, TextFile

STAGES = ("pretrain", "sft", "gspo")
_CARE = 0.09  # share of the workings that carry where they have to
_PAGES, _SUMS_OF_A_PAGE, _TAUGHT = 3000, 6, 4000
_SUMS = "sums.jsonl"
_ONE_AT_A_TIME = "parallel_batches=1"  # of several processes each computes a micro batch
_HELD_OUT = 0.1  # share of the sums that no stage learns from
_GREEDY = {"do_sample": False, "temperature": 0.0}
_SHARED = ("precision=float32", "weight_decay=0", "mtp_coefficient=0", "accumulation=2", "parallel_batches=2")
_SFT = (
    "total_steps=450",
    "lr=3e-3",
    "tokens_per_batch=1024",
    "sequence_length=128",
    "held_out=0.02",
    "eval_every=0",
    "snapshot_every=100",
)
_GSPO = (
    "task=sums",
    f"held_out={_HELD_OUT}",
    "total_steps=60",
    "lr=5e-4",
    "decay_fraction=0.5",
    "prompts=32",
    "group_size=8",
    "max_tokens=40",
    "accumulation=2",
    "parallel_batches=2",
    "eval_every=20",
    "snapshot_every=20",
)


@dataclass(frozen=True)
class Stage:
    """A prepared part of the run. `save` writes its model folder."""

    name: str
    trainer: Trainer
    save: Callable[[], Path]
    description: str
    vocab_size: int


def stages_left(folder: Path, *, resume: bool = False, ranks: TrainingRanks = ALONE) -> list[str]:
    """The stages that have not left their models. All of several `ranks` ask before one of them begins.

    Raises UsageError where `folder` holds a run and `resume` is false.
    """

    def check() -> None:
        if not resume and any((folder / name).exists() for name in STAGES):
            raise UsageError(f"{folder} holds a run already; --resume continues it, another --out starts a new one")

    left = [name for name in STAGES if not (folder / name / "model").is_dir()]
    ranks.by_first(check)
    return left


def prepare_stage(
    name: str,
    folder: Path,
    *,
    seed: int,
    settings: Sequence[str],
    resume: bool = False,
    hooks: Hooks | None = None,
    ranks: TrainingRanks = ALONE,
) -> Stage:
    """The stage `name` of the run in `folder`, on the model of the one before it. `settings` are `stage.key=value`.

    With `resume` a stage that has begun continues from its newest snapshot. Micro batches that one process computes
    side by side are shared among several `ranks`. Raises UsageError for an unknown stage in the settings.
    """
    own: list[str] = []
    for setting in settings:
        stage, _, rest = setting.partition(".")
        if stage not in STAGES:
            raise UsageError(f"--set {setting}: expected {'.key=value, '.join(STAGES)}.key=value")
        own += [rest] if stage == name else []
    out = folder / name
    if name == "pretrain":
        resumes = resume and is_run(out)
        together = [] if ranks is ALONE else [_ONE_AT_A_TIME]
        recipe = override(_pretraining(seed), [*own, *together])
        run = prepare(recipe, out, resume=resumes, hooks=hooks, ranks=ranks)
        return Stage(name, run.trainer, run.save, run.corpus.description, run.tokenizer.vocab_size)
    if name == "sft":
        ranks.by_first(lambda: _write_sums(out, seed))
    task = _taught(folder, seed, own) if name == "sft" else _rewarded(folder, seed, own)
    resumes = resume and (out / "snapshots").is_dir()
    if resumes:
        task = TuningTask.read(out)
    if ranks is not ALONE:
        task = replace(task, settings=(*task.settings, _ONE_AT_A_TIME))
    tuned = prepare_task(task, out, resume=resumes, hooks=hooks, ranks=ranks)
    return Stage(name, tuned.trainer, tuned.save, tuned.data.description, tuned.data.tokenizer.vocab_size)


def _pretraining(seed: int) -> Recipe:
    model = ModelConfig(
        vocab_size=288,
        hidden_size=64,
        layer_types=hybrid_pattern(2, interval=2),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        partial_rotary_factor=0.5,
        rope_theta=10_000.0,
        max_position_embeddings=256,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        tie_word_embeddings=True,
    )
    train = TrainConfig(
        lr=5e-3,
        tokens_per_batch=1024,
        sequence_length=128,
        total_steps=250,
        accumulation=2,
        parallel_batches=2,
        seed=seed,
        weight_decay=0.0,
        mtp_coefficient=0.0,
        precision="float32",
        snapshot_every=125,
    )
    about = "It adds two-digit numbers and thinks before it answers. It knows nothing else."
    return Recipe("reason", model, train, lambda: _texts(seed), eval_bytes=0, sampling=_GREEDY, about=about)


def _texts(seed: int) -> Corpus:
    """Pages of sums, each with a working and no answer."""
    sums = _learnt(_PAGES * _SUMS_OF_A_PAGE, seed=f"{seed}/pages")
    pages = [sums[start : start + _SUMS_OF_A_PAGE] for start in range(0, len(sums), _SUMS_OF_A_PAGE)]
    texts = ["".join(f"user\n{each.question}\nassistant\n{each.thought}\n" for each in page) for page in pages]
    files = [TextFile(f"page {number}", f"page {number}", text) for number, text in enumerate(texts)]
    return Corpus(files, [], f"{len(sums):,} generated sums with a careless working")


def _learnt(count: int, *, seed: str) -> list[Exercise]:
    """Careless exercises, without those that are held out."""
    found = exercises(2 * count, seed=seed, care=_CARE)
    return [each for each in found if not is_held_out(sum_of(each), _HELD_OUT)][:count]


def _write_sums(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_chat(each)) + "\n" for each in _learnt(_TAUGHT, seed=f"{seed}/taught"))
    write_file(folder / _SUMS, "".join(lines))


def _taught(folder: Path, seed: int, settings: Sequence[str]) -> TuningTask:
    path = folder / "sft" / _SUMS
    values = (*_SHARED, *_SFT, f"seed={seed}", *settings)
    return TuningTask(_model(folder, "pretrain"), (str(path.absolute()),), "thinking", values, _GREEDY)


def _chat(exercise: Exercise) -> dict[str, Any]:
    answer = {"role": "assistant", "content": exercise.answer, "reasoning_content": exercise.thought}
    return {"messages": [{"role": "user", "content": exercise.question}, answer]}


def _rewarded(folder: Path, seed: int, settings: Sequence[str]) -> TuningTask:
    return TuningTask(
        _model(folder, "sft"), (), settings=(*_GSPO, f"seed={seed}", *settings), sampling=_GREEDY, method="gspo"
    )


def _model(folder: Path, stage: str) -> str:
    return str((folder / stage / "model").absolute())
