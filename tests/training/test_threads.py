"""Micro batches side by side give the gradients that they give one after the other."""

from __future__ import annotations

import pytest
import torch

from qnext.errors import UsageError
from qnext.training.threads import BackwardThreads
from tests.training.models import tiny_model
from tests.training.test_loop import CONFIG, make_trainer


@pytest.mark.parametrize("mtp_start", [0.0, 1.0])
def test_parallel_step_equals_sequential_step(mtp_start: float) -> None:
    """Without the balance loss, whose counts see what ran before, only the order of additions differs."""
    config = CONFIG.with_(accumulation=4, balance_coefficient=0.0, mtp_start=mtp_start)
    models = []
    for parallel in (1, 2, 4):
        model = tiny_model(dtype=torch.float64)
        trainer = make_trainer(config.with_(parallel_batches=parallel), model=model)
        trainer.run(until_step=2)
        models.append(model)
    for other in models[1:]:
        for (name, a), (_, b) in zip(models[0].named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)


def test_threads_are_given_back_and_errors_come_through() -> None:
    threads, before = BackwardThreads(2), torch.get_num_threads()

    def fail() -> object:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        threads.backward([fail, fail], [])  # type: ignore[list-item]
    assert torch.get_num_threads() == before
    threads.close()


def test_parallel_batches_divide_the_accumulation() -> None:
    with pytest.raises(UsageError, match="parallel_batches"):
        CONFIG.with_(accumulation=3, parallel_batches=2)
