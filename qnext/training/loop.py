"""The training loop: micro batches -> losses -> gradients -> clip -> optimisers -> metrics, snapshots, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.checkpoint.snapshot import Snapshot, list_snapshots, load_snapshot, load_weights, newest_snapshot
from qnext.errors import CorruptCheckpoint, LostRank, QnextError, UsageError, warn
from qnext.model import CausalLM, DecoderLayer
from qnext.training.accumulation import Accumulation
from qnext.training.best import BestModel
from qnext.training.config import TrainConfig, learning_rate
from qnext.training.health import HealthProbe
from qnext.training.losses import RouterTap
from qnext.training.metrics import MetricsFile, StepMetrics, expert_stats
from qnext.training.objective import NextToken, Objective, TrainSource, TrainStep
from qnext.training.optimizer import load_optimizer_tensors, make_optimizers, optimizer_tensors, parameter_rules
from qnext.training.precision import PrecisionChoice, choose_precision
from qnext.training.ranks import ALONE, TrainingRanks, total_norm
from qnext.training.saving import parts_of_snapshot
from qnext.training.snapshot_writer import SnapshotFailed, SnapshotWriter
from qnext.training.spikes import SpikeGuard

_MAX_SKIPPED_IN_A_ROW = 10


class Diverged(QnextError):
    """Gradients stayed infinite or NaN."""


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to do during a run. The loop knows neither text nor engine."""

    on_step: Callable[[StepMetrics], None] | None = None
    evaluate: Callable[[], Any] | None = None  # returns a dataclass, which goes to the metrics file
    on_evaluation: Callable[[int, Any], None] | None = None
    on_sample: Callable[[int], str | None] | None = None  # what it returns goes to the metrics file
    on_snapshot: Callable[[Path], None] | None = None


class Trainer:
    """One training run. `model` is trained in place, on its device. Its parameters must be fp32 (fp64 in tests).

    `objective` None is NextToken with the coefficients of `config`. With `folder` the run writes `metrics.jsonl` and
    `snapshots/` there. Of several `ranks` each makes the same Trainer on its share of the model.
    """

    def __init__(
        self,
        model: CausalLM,
        stream: TrainSource,
        config: TrainConfig,
        *,
        objective: Objective | None = None,
        folder: Path | None = None,
        hooks: Hooks | None = None,
        ranks: TrainingRanks = ALONE,
    ) -> None:
        self.model, self.stream, self.config, self.ranks = model, stream, config, ranks
        self.objective = objective or NextToken.of(config)
        self.hooks = hooks or Hooks()
        self.rules = parameter_rules(model, optimizer=config.optimizer)
        self.precision = self._agreed_precision()
        self.step = 0
        self.tokens = 0
        self.num_skipped = 0
        self.spikes = SpikeGuard(config.spike_skip)
        self._parts = [rule._replace(parameter=ranks.part(rule.parameter)) for rule in self.rules]
        self.part_of = {rule.name: rule.parameter for rule in self._parts}
        self.best = BestModel(self.part_of, patience=config.early_stop)
        self.should_stop = False  # set it, from a hook or a signal, and the run ends after the step
        self._optimizers = make_optimizers(self._parts, config, ranks)
        self._parameters = list(self.part_of.values())
        self._accumulation = Accumulation(model, self.objective, config, ranks)
        for module in model.modules():
            if isinstance(module, DecoderLayer):
                module.is_recomputed = config.checkpoint_activations
        if config.early_stop and self.hooks.evaluate is None:
            raise UsageError("early_stop: nothing is held out that could be evaluated")
        self.folder = folder
        self._snapshots: SnapshotWriter | None = None
        if folder is not None:
            self._snapshots = SnapshotWriter(
                folder / "snapshots", keep=config.keep_snapshots, part_of=self.part_of, ranks=ranks
            )
        self._metrics: MetricsFile | None = None
        self._elapsed_before = self._now = 0.0  # seconds of the run; `_now` is the time of the last step's begin
        self._started = time.perf_counter()
        self._step_seconds = 0.0
        self._furthest = 0.0
        self._skipped_in_a_row = 0
        self._evaluated_step = -1
        self.last_evaluation: tuple[int, Any] | None = None  # the step and the result

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return self._elapsed_before + time.perf_counter() - self._started

    @property
    def progress(self) -> float:
        """The part of the run that is over, measured at the middle of the next step."""
        if self.config.total_steps is not None:
            return min(1.0, (self.step + 0.5) / self.config.total_steps)
        assert self.config.time_budget is not None
        return min(1.0, (self._now + 0.5 * self._step_seconds) / self.config.time_budget)

    @property
    def is_done(self) -> bool:
        if self.best.is_over:
            return True
        if self.config.total_steps is not None:
            return self.step >= self.config.total_steps
        assert self.config.time_budget is not None
        return self._now >= self.config.time_budget

    def run(self, *, until_step: int | None = None) -> None:
        """Train to the end of the run, to `until_step`, or until `should_stop`.

        The clock of a time budget starts here. Raises Diverged after ten steps in a row without finite gradients.
        """
        self._started = time.perf_counter()
        if self.folder is not None and self.ranks.is_first:
            self._metrics = MetricsFile(self.folder / "metrics.jsonl", last_step=self.step)
        was_training = self.model.training
        self.model.train()
        tap = RouterTap(self.model)
        try:
            with self.ranks.guarded():
                while not self._is_over(until_step):
                    self._report(self._one_step(tap))
                self._end_snapshot()
        except BaseException as error:
            if not isinstance(error, LostRank):  # with whom nothing is written any more
                self._end_snapshot()
            raise
        finally:
            tap.close()
            self.model.train(was_training)
            self._elapsed_before, self._started = self.elapsed, time.perf_counter()

    def _is_over(self, until_step: int | None) -> bool:
        """Decided by all ranks alike: the clock is that of the first, and a signal to one is one to all."""
        told_R2 = self.ranks.gather_parts(torch.tensor([self.elapsed, float(self.should_stop)], dtype=torch.float64))
        self._now, self.should_stop = float(told_R2[0, 0]), bool(told_R2[:, 1].any())
        return self.is_done or self.should_stop or self.step == until_step

    def _one_step(self, tap: RouterTap) -> StepMetrics:
        start = time.perf_counter()
        # A slow step before a fast one would turn the clock back: its length was a bad guess for the next.
        progress = self._furthest = max(self._furthest, self.progress)
        lr = learning_rate(self.config, progress=progress, step=self.step)
        batches = [self.stream.next_batch() for _ in range(self.config.accumulation)]
        probe = HealthProbe(self.model) if self._is_looked_at(self.config.health_every) else None
        is_bfloat16 = self.precision.precision == "bfloat16"
        with probe or nullcontext():
            step = TrainStep(batches, progress, tap)
            parts, counts = self._accumulation.backward(step, self._parameters, is_bfloat16=is_bfloat16, probe=probe)
        self.ranks.collect_gradients()
        norm = total_norm([p.grad for p in self._parameters if p.grad is not None], self.ranks)
        # The only place where a step waits for numbers.
        *values, grad_norm = torch.stack([*parts.values(), norm.to(next(iter(parts.values())))]).tolist()
        losses = dict(zip(parts, values, strict=True))
        health = None if probe is None else probe.health(self._parts, self.ranks)
        is_finite = math.isfinite(grad_norm)
        skipped_for = self.spikes.judge(losses, grad_norm=grad_norm) if is_finite else "not finite"
        if skipped_for is None:
            self._update(norm, lr)
        for rule in (*self.rules, *self._parts):
            rule.parameter.grad = None
        self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1
        self.num_skipped += skipped_for is not None
        wants_stats = counts is not None and self._is_looked_at(self.config.expert_stats_every)
        self.step += 1
        num_tokens = sum(batch.num_tokens for batch in batches)
        self.tokens += num_tokens
        self._step_seconds = time.perf_counter() - start
        return StepMetrics(
            step=self.step,
            progress=progress,
            tokens=self.tokens,
            loss=losses.pop("main"),
            mtp_loss=losses.pop("mtp", None),
            balance=losses.pop("balance", None),
            z_loss=losses.pop("z", None),
            lr=lr,
            grad_norm=grad_norm,
            was_skipped=skipped_for is not None,
            skipped_for=skipped_for,
            num_skipped=self.num_skipped,
            epoch=self.stream.epoch,
            elapsed=self.elapsed,
            tokens_per_second=num_tokens / self._step_seconds,
            experts=expert_stats(counts) if wants_stats and counts is not None else None,
            health=health,
            other_losses=losses,
        )

    def _is_looked_at(self, every: int) -> bool:
        """Whether the next step is the first one, or one of every so many."""
        return _is_due(self.step + 1, every) or (every > 0 and self.step == 0)

    def _update(self, norm: Tensor, lr: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            optimizer.step()

    def _report(self, metrics: StepMetrics) -> None:
        if self._metrics is not None:
            self._metrics.write_step(metrics)
        if self.hooks.on_step is not None:
            self.hooks.on_step(metrics)
        if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"gradients were not finite in the last {_MAX_SKIPPED_IN_A_ROW} steps, up to step {self.step}; "
                f"lower lr or raise warmup_steps{self._advice()}"
            )
        config = self.config
        if _is_due(self.step, config.eval_every):
            self.evaluate()
        if _is_due(self.step, config.sample_every) and (on_sample := self.hooks.on_sample) is not None:
            with self._not_training():
                text = on_sample(self.step)
            if self._metrics is not None and text is not None:
                self._metrics.write_sample(self.step, text)
        if self._snapshots is None:
            return
        if self._snapshots.is_written:
            self._end_snapshot()
        # A snapshot of a run that has just become unusable would push out one that is not.
        if _is_due(self.step, config.snapshot_every) and not self._skipped_in_a_row:
            self._end_snapshot()
            self._snapshots.begin(self._snapshot())

    def _end_snapshot(self) -> None:
        """Wait for the snapshot that is being written, if one is. A failure costs it alone."""
        if self._snapshots is None or (step := self._snapshots.begun_step) is None:
            return
        try:
            self._tell_snapshot(self._snapshots.ended())
        except SnapshotFailed as error:
            warn(f"{error}; the run goes on and tries again at step {step + self.config.snapshot_every}")

    def _tell_snapshot(self, path: Path) -> None:
        if self.hooks.on_snapshot is not None:
            self.hooks.on_snapshot(path)

    def _advice(self) -> str:
        """Where to continue, when the newest snapshot already held weights that give no finite gradients."""
        self._end_snapshot()
        paths = [] if self.folder is None else list(list_snapshots(self.folder / "snapshots"))
        last_finite = self.step - self._skipped_in_a_row
        if len(paths) < 2 or paths[-1].name != f"step-{last_finite:08}":
            return ""
        return f"; without {paths[-1]} --resume continues from {paths[-2].name}"

    def _agreed_precision(self) -> PrecisionChoice:
        """What the first process has chosen."""
        choice = choose_precision(self.config.precision, self.model.device)
        if bool(self.ranks.gather_parts(torch.tensor([choice.precision == "bfloat16"]))[0, 0]):
            return choice._replace(precision="bfloat16")
        return choice._replace(precision="float32")

    def evaluate(self) -> Any:
        """Call the evaluation hook, record its result and return it. None without a hook, or if this step was evaluated
        already."""
        if self.hooks.evaluate is None or self._evaluated_step == self.step:
            return None
        self._evaluated_step = self.step
        with self._not_training():
            result = self.hooks.evaluate()
        self.last_evaluation = (self.step, result)
        if self.step and (self.is_done or _is_due(self.step, self.config.eval_every)):
            self.best.judge(self.step, result)
        if self._metrics is not None:
            self._metrics.write_evaluation(self.step, result)
        if self.hooks.on_evaluation is not None:
            self.hooks.on_evaluation(self.step, result)
        return result

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def save(self) -> Path:
        """Write a snapshot of everything that the run needs to continue, and wait for it. Raises SnapshotFailed.

        The run writes those that are due by itself while it goes on. There a failure is a warning, and the next
        snapshot may succeed.
        """
        assert self._snapshots is not None, "a run without a folder cannot be saved"
        self._end_snapshot()
        path = self._snapshots.write(self._snapshot())
        self._tell_snapshot(path)
        return path

    def _snapshot(self) -> Snapshot:
        random = {"cpu": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.model.device)
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": self.part_of,
            "optimizer": optimizer_tensors(self._optimizers, self._parts),
            "random": random,
        }
        if self.best.weights:
            tensors["best"] = self.best.weights
        state = {
            "tokens": self.tokens,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "elapsed": self.elapsed,
            "step_seconds": self._step_seconds,
            "precision": self.precision.precision,
            "optimizer": self.config.optimizer,
            "data": deepcopy(dict(self.stream.position)),
            "spikes": deepcopy(self.spikes.state),
            "best": self.best.state,
            "config": asdict(self.config),
        }
        return Snapshot(self.step, tensors, state)

    def resume(self, path: Path | None = None) -> Path | None:
        """Continue from the snapshot at `path`, or from the newest complete one of this run. Returns None where there
        is none.

        With the same configuration and data the run continues bit for bit on the CPU, unless it follows the clock.
        Raises CorruptCheckpoint naming what is damaged or does not belong to this run.
        """
        if path is None:
            assert self.folder is not None
            found = newest_snapshot(self.folder / "snapshots")
            if found is None:
                return None
            path, snapshot = found
        else:
            snapshot = load_snapshot(path)
        state = snapshot.state
        try:
            if state["optimizer"] != self.config.optimizer:
                raise CorruptCheckpoint(
                    f"{path}: taken with optimizer {state['optimizer']!r}, this run has {self.config.optimizer!r}"
                )
            self.stream.seek(state["data"])
            found_of = parts_of_snapshot(snapshot, self.part_of, self.ranks, source=str(path))
            load_weights(self.part_of, found_of["model"], source=str(path))
            load_optimizer_tensors(self._optimizers, self._parts, found_of["optimizer"])
            self._restore_random(snapshot.tensors["random"])
            self.step, self.tokens, self.num_skipped = snapshot.step, state["tokens"], state["num_skipped"]
            self._skipped_in_a_row, self._elapsed_before = state["skipped_in_a_row"], state["elapsed"]
            self._step_seconds = state["step_seconds"]
            self.precision = PrecisionChoice(state["precision"])
            if "spikes" in state:
                self.spikes.restore(state["spikes"])
                self.best.restore(state["best"], found_of["best"])
        except (KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"{path}: state.json or a tensor file lacks {error}") from error
        return path

    def _restore_random(self, random: Any) -> None:
        torch.set_rng_state(random["cpu"])
        if self.model.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.model.device)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
