"""Supervised fine-tuning is NextToken on samples with a mask: its mean and its isolation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qnext.model import CausalLM
from qnext.training.data import DocumentRows, TrainBatch, pack
from qnext.training.losses import RouterTap
from qnext.training.objective import NextToken, TrainStep
from tests.training.models import tiny_model
from tests.training.test_samples import samples

LENGTHS = [12, 40, 7, 3, 21, 33]


def micro_batches(cuts: list[list[int]]) -> list[TrainBatch]:
    given = samples(LENGTHS)
    return [pack([DocumentRows(given[index], 0, len(given[index]) - 1) for index in cut]) for cut in cuts]


def step_of(cuts: list[list[int]], objective: NextToken) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses of a step that is cut so, and its gradients."""
    model, parts = tiny_model(dtype=torch.float64), micro_batches(cuts)
    step = TrainStep(parts, 0.0, RouterTap(model))
    total: dict[str, Tensor] = {}
    for part in parts:
        losses = objective(model, part, step)
        losses.total.backward()
        for name, value in losses.values.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + value
    return total, [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("cuts", [[[0], [1], [2, 3], [4, 5]], [[0, 1, 2, 3, 4], [5]]])
def test_the_mean_is_over_the_learnt_tokens_of_the_step_however_it_is_cut(cuts: list[list[int]]) -> None:
    """The parts hold different numbers of learnt tokens: a mean of means would not pass."""
    parts = micro_batches(cuts)
    assert len({part.num_labels for part in parts}) > 1 and all(part.num_labels < part.num_tokens for part in parts)
    objective = NextToken(mtp=0.3)
    whole, gradients = step_of([list(range(len(LENGTHS)))], objective)
    cut, others = step_of(cuts, objective)
    for name in ("main", "mtp"):
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-12, atol=0)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def gradient_of_inputs(model: CausalLM, batch: TrainBatch, objective: NextToken) -> list[Tensor]:
    """Of the objective with respect to every embedded row, as often as the model embeds."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = model.model.embed_tokens.register_forward_hook(keep)
    losses = objective(model, batch, TrainStep([batch], 0.0, RouterTap(model)))
    handle.remove()
    return list(torch.autograd.grad(losses.total, seen))


@pytest.mark.parametrize("mtp_steps", [1, 2])
def test_a_sample_has_no_gradient_in_the_loss_of_another(mtp_steps: int) -> None:
    """All labels but those of one sample are taken out; the embeddings of the others then have a gradient of zero."""
    model, objective = tiny_model(dtype=torch.float64), NextToken(mtp=0.3, mtp_steps=mtp_steps)
    (batch,) = micro_batches([list(range(len(LENGTHS)))])
    starts = [sum(length - 1 for length in LENGTHS[:index]) for index in range(len(LENGTHS) + 1)]
    for start, end in itertools.pairwise(starts):
        outside = torch.ones(len(batch.labels_T), dtype=torch.bool)
        outside[start:end] = False
        alone = batch._replace(
            labels_T=batch.labels_T.masked_fill(outside, -100),
            mtp_labels_T=batch.mtp_labels_T.masked_fill(outside, -100),
        )
        gradients = gradient_of_inputs(model, alone, objective)
        assert len(gradients) == 1 + mtp_steps
        for gradient in gradients:
            assert gradient[outside].eq(0).all()
        assert gradients[0][~outside].abs().sum() > 0


def test_the_check_itself_sees_a_leak() -> None:
    """The same rows as one sample: then there is a gradient."""
    model = tiny_model(dtype=torch.float64)
    (given,) = samples([40])
    batch = pack([DocumentRows(given, 0, 39)])
    labels = batch.labels_T.clone()
    labels[:20] = -100
    (first,) = gradient_of_inputs(model, batch._replace(labels_T=labels), NextToken())
    assert first[:20].abs().sum(-1).gt(0).all()
