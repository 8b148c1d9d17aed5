"""The model: logits, gradients and weights that are codes."""

from __future__ import annotations

import copy

import pytest
import torch

from qnext.model import Batch
from tests.engine.models import KINDS, tiny_model
from tests.other_device.device import OtherDevice, moved, other_device

LENGTHS = [70, 3, 1, 40]


def _tokens() -> torch.Tensor:
    return torch.arange(sum(LENGTHS)) * 7 % 97


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_cpu(kind: str, other: OtherDevice) -> None:
    here = copy.deepcopy(tiny_model(kind))
    there = moved(here)
    found = []
    for model in (here, there):
        logits_TY = model.logits(model(Batch.from_lengths(_tokens().to(model.device), LENGTHS)).hidden_TD)
        logits_TY.square().mean().backward()
        assert logits_TY.device == model.device
        found.append(logits_TY)
    torch.testing.assert_close(found[1].detach().cpu(), found[0].detach(), rtol=1e-4, atol=1e-4)
    for (name, mine), its in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None), name
        if mine.grad is not None and its.grad is not None:
            assert its.grad.device == other_device(), name
            torch.testing.assert_close(its.grad.cpu(), mine.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_forward_pass_never_waits(other: OtherDevice) -> None:
    model = moved(tiny_model("hybrid"))
    batch = Batch.from_lengths(_tokens().to(model.device), LENGTHS)
    with torch.no_grad():
        model.logits(model(batch).hidden_TD)
    assert other.num_reads == 0
