from __future__ import annotations

import math

import pytest

from qnext.errors import UsageError
from qnext.training import TrainConfig, learning_rate

GOOD = {"lr": 1e-3, "tokens_per_batch": 64, "sequence_length": 32, "total_steps": 100}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("min_lr", 2e-3),
        ("tokens_per_batch", 0),
        ("accumulation", 0),
        ("total_steps", 0),
        ("total_steps", None),
        ("time_budget", 5.0),
        ("beta1", 1.0),
        ("decay_fraction", 1.5),
        ("optimizer", "sgd"),
        ("precision", "fp8"),
        ("decay_shape", "cosine"),
        ("clip_norm", -1.0),
        ("warmup_fraction", 0.9),
        ("weight_decay", -0.1),
    ],
)
def test_impossible_values_are_named(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        TrainConfig(**{**GOOD, field: value})  # type: ignore[arg-type]


def test_time_budget_must_be_positive() -> None:
    with pytest.raises(UsageError, match="time_budget"):
        TrainConfig(**{**GOOD, "total_steps": None, "time_budget": -3.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_schedule_rises_stays_and_falls(shape: str) -> None:
    config = TrainConfig(
        **GOOD,
        min_lr=1e-4,
        warmup_fraction=0.1,
        decay_fraction=0.2,
        decay_shape=shape,  # type: ignore[arg-type]
    )
    at = [learning_rate(config, progress=p, step=1000) for p in (0.0, 0.05, 0.1, 0.5, 0.8, 0.85, 0.9, 1.0)]
    assert at[0] == 0.0
    assert at[1] == pytest.approx(5e-4)
    assert at[2:5] == pytest.approx([1e-3] * 3)
    quarter = 0.75 if shape == "linear" else 0.5  # 1 - x and 1 - sqrt(x) at x = 1/4
    assert at[5] == pytest.approx(1e-4 + 9e-4 * quarter)
    assert at[4] > at[5] > at[6] > at[7] == pytest.approx(1e-4)


def test_the_slower_warm_up_holds() -> None:
    config = TrainConfig(**GOOD, warmup_fraction=0.1, warmup_steps=10)  # type: ignore[arg-type]
    assert learning_rate(config, progress=0.5, step=0) == pytest.approx(1e-4)
    assert learning_rate(config, progress=0.01, step=50) == pytest.approx(1e-4)
    assert learning_rate(config, progress=0.5, step=9) == pytest.approx(1e-3)


def test_no_decay() -> None:
    config = TrainConfig(**GOOD, decay_fraction=0.0, warmup_fraction=0.0)  # type: ignore[arg-type]
    assert [learning_rate(config, progress=p, step=0) for p in (0.0, 1.0)] == [1e-3, 1e-3]
