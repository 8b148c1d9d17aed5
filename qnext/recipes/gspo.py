"""Reasoning by reinforcement (GSPO): a model draws answers to problems and learns from what a function rewards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qnext.engine import SamplingParams
from qnext.errors import UsageError, did_you_mean, warn
from qnext.model import Batch, CausalLM
from qnext.planning import count_parameters
from qnext.recipes.adapted import adapt
from qnext.recipes.chat_folder import tokenizer_folder
from qnext.recipes.drawing import DrawnTogether
from qnext.recipes.rewards import REWARDS, TASKS, final_answer, is_held_out, queries_of
from qnext.recipes.rollouts import Answer, Problem, RolloutConfig, RolloutSource, answer_of, draw_answers
from qnext.recipes.settings import parse_settings, with_end_of_run
from qnext.recipes.tuning import TOKENIZER, TuningRun, load_base, made_if_understood
from qnext.recipes.tuning_task import TuningTask
from qnext.session.folder import ProgressOf, TextFolder, no_progress, open_folder
from qnext.text.chat import ChatFormat
from qnext.text.prompts import ChatPrompt
from qnext.text.tokenizer import Tokenizer
from qnext.training import Hooks, TrainConfig, Trainer
from qnext.training.policy import PolicyGradient
from qnext.training.ranks import ALONE, TrainingRanks, first_then_all

_LR = 0.1  # of that of SFT
_ROUTED_PROMPTS = 64  # whose routing chooses the experts of an adapter
# Rollouts decide the sizes, the numbers must be those of the engine, and an op keeps its inputs alone anyway.
_NOT_HERE = (
    *("tokens_per_batch", "sequence_length", "precision", "checkpoint_activations"),
    *("mtp_coefficient", "mtp_start", "mtp_steps", "mtp_detach_trunk"),
)


@dataclass(frozen=True)
class GspoConfig(RolloutConfig):
    """The choices of a run beside TrainConfig; those of the objective are those of PolicyGradient.

    `max_mismatch` None: zero where kernels serve the whole model, no limit elsewhere. Raises UsageError naming what is
    impossible.
    """

    task: str | None = None  # a name of TASKS; None: files
    reward: str = "exact"  # a name of REWARDS
    clip_low: float = PolicyGradient.clip_low
    clip_high: float = PolicyGradient.clip_high
    kl: float = 0.0
    replays: bool = True
    max_mismatch: float | None = None
    held_out: float = 0.1  # share of the problems that is evaluated on and not trained on
    eval_problems: int = 256  # of these at most

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("task", TASKS), ("reward", REWARDS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {value!r}{did_you_mean(value, known)}")
        if not 0.0 <= self.held_out <= 0.5:
            raise UsageError(f"held_out must be between 0 and 0.5, not {self.held_out}")
        if self.eval_problems < 1:
            raise UsageError(f"eval_problems must be at least 1, not {self.eval_problems}")
        self.objective(0.0, 0.0)

    def objective(self, balance: float, z: float) -> PolicyGradient:
        return PolicyGradient(
            self.clip_low, self.clip_high, self.kl, self.replays, self.max_mismatch, balance=balance, z=z
        )


@dataclass(frozen=True)
class HeldOutReward:
    """Of problems that are not trained on: the mean reward of answers drawn as in training, and of the likeliest."""

    reward: float
    greedy: float
    length: float  # tokens of a drawn answer
    num_problems: int

    @property
    def summary(self) -> str:
        return (
            f"held-out reward {self.reward:.1%}, greedy {self.greedy:.1%} ({self.num_problems} problems, "
            f"{self.length:.1f} tokens an answer)"
        )


@dataclass(frozen=True)
class GspoData:
    """The problems of a task as prompts, and what rewards an answer."""

    task: TuningTask
    config: GspoConfig
    train: dict[str, Any]  # settings of TrainConfig
    base: TextFolder
    tokenizer: Tokenizer
    problems: list[Problem]
    held_out: list[Problem]
    thinking: frozenset[tuple[int, ...]] = field(repr=False, default=frozenset())  # prompts that open a thought

    @property
    def description(self) -> str:
        source = self.config.task or ", ".join(self.task.data)
        return (
            f"{source}: {len(self.problems):,} problems, {len(self.held_out):,} held out; reward: {self.config.reward}"
        )

    def reward(self, problem: Problem, answer: Answer) -> float:
        """An answer without an end is none."""
        if not answer.has_ended:
            return 0.0
        text = self.tokenizer.decode(list(answer.token_ids), skip_special=True)
        said = final_answer(text, is_thinking=problem.prompt_ids in self.thinking)
        return 0.0 if said is None else REWARDS[self.config.reward](said, problem.answer)


def prepare_gspo(
    task: TuningTask,
    folder: Path,
    *,
    resume: bool = False,
    hooks: Hooks | None = None,
    progress: ProgressOf = no_progress,
    ranks: TrainingRanks = ALONE,
) -> TuningRun:
    """Read the problems, load the base in fp32, and make the trainer. With `resume`, continue from the newest snapshot.

    An `evaluate` in `hooks` is replaced by the reward on held-out problems. Each of several `ranks` has a whole copy of
    the model beside its part, and draws with it.
    """
    data = first_then_all(ranks, partial(_read_in_turn, task, folder))
    model, dtypes, _ = load_base(data, progress)
    config, own = _train_config(data, model), data.config
    reference = copy.deepcopy(model).requires_grad_(False) if own.kl > 0.0 else None
    adapted = ""
    if task.adapter is not None:
        adapted = adapt(model, replace(task.adapter, mtp=False), _batches(data, model), seed=config.seed)
    if own.max_mismatch is None and model.is_cut_invariant:
        own = replace(own, max_mismatch=0.0)
    draw = DrawnTogether(model, ranks)
    source = RolloutSource(
        model,
        data.problems,
        data.reward,
        own,
        end_ids=data.tokenizer.eos_ids,
        accumulation=config.accumulation,
        seed=config.seed,
        reference=reference,
        draw=draw,
    )
    ranks.shard(model)
    trainer = Trainer(
        model,
        source,
        config,
        objective=own.objective(config.balance_coefficient, config.z_loss_coefficient),
        folder=folder,
        hooks=replace(hooks or Hooks(), evaluate=_evaluation(data, draw)),
        ranks=ranks,
    )
    if resume:
        trainer.resume()
    return TuningRun(data, folder, trainer, dtypes, adapted)


def _read_in_turn(task: TuningTask, folder: Path, is_first: bool) -> GspoData:
    """With the tokenizer and the task in the folder; not first, by the tokenizer of another process."""
    if not is_first:
        return _read(task, folder, makes=False)
    with made_if_understood(folder):
        data = _read(task, folder, makes=True)
    task.write(folder)
    return data


def _read(task: TuningTask, folder: Path, *, makes: bool) -> GspoData:
    own, train = parse_settings(task.settings, GspoConfig, TrainConfig)
    for name in _NOT_HERE:
        if name in train:
            raise UsageError(f"--set {name}: does not go together with rollouts")
    config = GspoConfig(**own)
    if (config.task is None) != bool(task.data):
        raise UsageError("problems come from either --task NAME or --data FILE")
    base = open_folder(task.base)
    tokens = folder / TOKENIZER
    if makes:
        tokenizer_folder(tokens, base, template=task.template, sampling=task.sampling)
    tokenizer = Tokenizer.from_folder(tokens, num_rows=base.config.vocab_size)
    if config.task is not None:
        queries = TASKS[config.task]()
    else:
        queries = [query for path in task.data for query in queries_of(Path(path))]
    room = base.config.max_position_embeddings - config.max_tokens
    problems: list[Problem] = []
    held_out: list[Problem] = []
    thinking: set[tuple[int, ...]] = set()
    num_long = 0
    chat_format = ChatFormat.for_folder(tokens, tokenizer=tokenizer)
    try:
        for query in queries:
            prompt = ChatPrompt(query.messages).encode(chat_format, tokenizer)
            problem = Problem(tuple(prompt.token_ids), query.answer)
            if len(problem.prompt_ids) > room:
                num_long += 1
                continue
            if prompt.thought == "open":
                thinking.add(problem.prompt_ids)
            (held_out if is_held_out(query, config.held_out) else problems).append(problem)
    finally:
        chat_format.close()
    if num_long:
        warn(f"{num_long} problems leave no room for {config.max_tokens} tokens in the context and are left out")
    if not problems:
        raise UsageError("no problem is left to train on")
    return GspoData(task, config, train, base, tokenizer, problems, held_out, frozenset(thinking))


def _train_config(data: GspoData, model: CausalLM) -> TrainConfig:
    """Defaults for the size of the model, under the settings of the task."""
    own, count = data.config, count_parameters(model.config).total
    longest = max((len(problem.prompt_ids) for problem in data.problems), default=1) + own.max_tokens
    accumulation = data.train.get("accumulation", 1)
    answers = -(-own.prompts * own.group_size // (own.minibatches * accumulation))
    values: dict[str, Any] = {
        "lr": _LR * 2e-5 * (1e9 / count) ** 0.5,
        "tokens_per_batch": answers * longest,  # at most
        "sequence_length": longest,
        "total_steps": 100,
        "warmup_fraction": 0.0,
        "decay_fraction": 0.2,
        "weight_decay": 0.0,
        "balance_coefficient": 0.0,
        "z_loss_coefficient": 0.0,
        "mtp_coefficient": 0.0,
        "precision": "float32",  # of the engine
        "eval_every": 20,
        "snapshot_every": 20,
    }
    if data.task.adapter is not None:
        values["lr"] *= 10.0
    return TrainConfig(**{**values, **with_end_of_run(data.train)})


def _batches(data: GspoData, model: CausalLM) -> list[Batch]:
    prompts = [torch.tensor(problem.prompt_ids) for problem in data.problems[:_ROUTED_PROMPTS]]
    return [Batch.from_lengths(ids.to(model.device), [len(ids)]) for ids in prompts]


def _evaluation(data: GspoData, draw: DrawnTogether) -> Callable[[], HeldOutReward] | None:
    if not data.held_out:
        warn("no problem is held out; there will be no evaluation")
        return None
    return lambda: held_out_reward(data, draw.whole(), data.held_out[: data.config.eval_problems])


def held_out_reward(data: GspoData, model: CausalLM, problems: Sequence[Problem]) -> HeldOutReward:
    def answers(temperature: float) -> list[Answer]:
        params = [
            SamplingParams(temperature=temperature, max_tokens=data.config.max_tokens, seed=number)
            for number in range(len(problems))
        ]
        prompts = [problem.prompt_ids for problem in problems]
        return [answer_of(each) for each in draw_answers(model, prompts, params, end_ids=data.tokenizer.eos_ids)]

    drawn, likeliest = answers(1.0), answers(0.0)
    means = [
        sum(data.reward(problem, answer) for problem, answer in zip(problems, found, strict=True)) / len(problems)
        for found in (drawn, likeliest)
    ]
    length = sum(len(answer.token_ids) + answer.has_ended for answer in drawn) / len(problems)
    return HeldOutReward(means[0], means[1], length, len(problems))
