"""TrainConfig: every number of a run that is not the model's, and the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from qnext.errors import UsageError


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run. Raises UsageError naming the field when a value is impossible.

    A run ends after `total_steps` optimiser steps or after `time_budget` seconds; exactly one of them is set. With a
    time budget the schedule follows the clock. Such a run cannot be repeated or resumed bit for bit. With `total_steps`
    it can.
    """

    lr: float
    tokens_per_batch: int  # tokens of one micro batch, always exactly this many
    sequence_length: int  # longer documents are cut into pieces
    total_steps: int | None = None
    time_budget: float | None = None  # seconds, evaluation and samples included
    accumulation: int = 1  # micro batches per optimiser step
    parallel_batches: int = 1  # micro batches that run at once, a thread each; accumulation is a multiple of it
    checkpoint_activations: bool = False  # layers compute their activations again in the backward pass: less memory
    seed: int = 0
    # optimiser
    optimizer: Literal["adamw", "muon"] = "adamw"
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    muon_momentum: float = 0.95
    muon_lr: float | None = None  # of the matrices that Muon has; None: lr
    # A step whose loss or gradient norm lies so many deviations above the median of the last 201 is not applied: see
    # SpikeGuard. 6 to 10 are usual; 0: every step is.
    spike_skip: float = 0.0
    # warm-up, stable, decay; the slower of the two warm-ups holds
    warmup_fraction: float = 0.02
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    # losses
    balance_coefficient: float = 0.01
    z_loss_coefficient: float = 1e-3
    mtp_coefficient: float = 0.1
    mtp_start: float = 0.0  # part of the run after which the MTP module is trained
    mtp_steps: int = 1  # drafts in a row that the MTP module is trained for, on its own results from the second on
    mtp_detach_trunk: bool = False  # the trunk's layers get no gradient of the MTP loss
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # what happens every so many steps; 0 means never
    expert_stats_every: int = 10
    health_every: int = 10
    eval_every: int = 0
    early_stop: int = 0  # evaluations in a row without a better one that end the run; the best one's weights are saved
    sample_every: int = 0
    snapshot_every: int = 0
    keep_snapshots: int = 2
    watts: float | None = None  # what the machine draws; the provenance of the result then tells the energy

    def __post_init__(self) -> None:
        if (self.total_steps is None) == (self.time_budget is None):
            raise UsageError("exactly one of total_steps and time_budget must be set")
        _check_choices(self)
        _check_ranges(self)

    @property
    def tokens_per_step(self) -> int:
        return self.tokens_per_batch * self.accumulation

    def with_(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed. All fields are checked again."""
        return replace(self, **changes)


_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "decay_shape": ("linear", "sqrt"),
    "precision": ("auto", "float32", "bfloat16"),
}
_AT_LEAST_ONE = (
    "tokens_per_batch",
    "sequence_length",
    "accumulation",
    "parallel_batches",
    "keep_snapshots",
    "mtp_steps",
)
_POSITIVE = ("lr", "eps", "clip_norm")
_NOT_NEGATIVE = (
    "min_lr",
    "weight_decay",
    "spike_skip",
    "warmup_steps",
    "balance_coefficient",
    "z_loss_coefficient",
    "mtp_coefficient",
    "expert_stats_every",
    "health_every",
    "eval_every",
    "early_stop",
    "sample_every",
    "snapshot_every",
)
_FRACTIONS = ("warmup_fraction", "decay_fraction", "mtp_start")
_BELOW_ONE = ("beta1", "beta2", "muon_momentum")


def _check_choices(config: TrainConfig) -> None:
    for name, known in _CHOICES.items():
        if getattr(config, name) not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, not {getattr(config, name)!r}")


def _check_ranges(config: TrainConfig) -> None:
    def refuse(name: str, rule: str) -> None:
        raise UsageError(f"{name} must be {rule}, not {getattr(config, name)}")

    for name in (*_POSITIVE, *_NOT_NEGATIVE, *_FRACTIONS, *_BELOW_ONE):
        if not math.isfinite(getattr(config, name)):
            refuse(name, "finite")
    if config.muon_lr is not None and not 0.0 < config.muon_lr < math.inf:
        refuse("muon_lr", "positive")
    for name in _AT_LEAST_ONE:
        if getattr(config, name) < 1:
            refuse(name, "at least 1")
    for name in _POSITIVE:
        if not getattr(config, name) > 0:
            refuse(name, "positive")
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            refuse(name, "zero or more")
    for name in _FRACTIONS:
        if not 0.0 <= getattr(config, name) <= 1.0:
            refuse(name, "between 0 and 1")
    for name in _BELOW_ONE:
        if not 0.0 <= getattr(config, name) < 1.0:
            refuse(name, "at least 0 and below 1")
    if config.early_stop and not config.eval_every:
        raise UsageError("early_stop needs evaluations: set eval_every")
    if config.min_lr > config.lr:
        refuse("min_lr", f"no more than lr ({config.lr})")
    if config.total_steps is not None and config.total_steps < 1:
        refuse("total_steps", "at least 1")
    if config.watts is not None and not 0.0 <= config.watts < math.inf:
        refuse("watts", "a number of watts")
    if config.time_budget is not None and not 0.0 < config.time_budget < math.inf:
        refuse("time_budget", "a positive number of seconds")
    if config.accumulation % config.parallel_batches:
        refuse("parallel_batches", f"a divisor of accumulation ({config.accumulation})")
    if config.warmup_fraction + config.decay_fraction > 1.0:
        raise UsageError("warmup_fraction and decay_fraction together exceed 1")


def learning_rate(config: TrainConfig, *, progress: float, step: int) -> float:
    """Warm-up, stable phase, decay (WSD), at the part `progress` (0 to 1) of the run, before step `step` (from zero).

    The warm-up is linear over `warmup_fraction` of the run and over `warmup_steps` steps. In the last `decay_fraction`
    the rate falls to `min_lr`: as 1 - x or as 1 - sqrt(x), where x is the progress of the decay (arXiv 2405.18392).
    """
    warm = 1.0
    if config.warmup_fraction > 0.0:
        warm = min(warm, progress / config.warmup_fraction)
    if config.warmup_steps > 0:
        warm = min(warm, (step + 1) / config.warmup_steps)
    decay_start = 1.0 - config.decay_fraction
    if progress <= decay_start:
        return config.lr * warm
    done = min(1.0, (progress - decay_start) / config.decay_fraction)
    left = 1.0 - (math.sqrt(done) if config.decay_shape == "sqrt" else done)
    return (config.min_lr + (config.lr - config.min_lr) * left) * warm
