"""Preference: the packed loss is that of the formula, a pair is alone, and a step can be cut anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.lora import LoraConfig, add_lora
from qnext.model import CausalLM
from qnext.model.batch import Batch
from qnext.training.losses import RouterTap
from qnext.training.objective import Losses, TrainStep
from qnext.training.preference import PAIRS, DirectPreference, Pair, PairBatch, reference_scores
from tests.training.models import END, tiny_model

LENGTHS = [(3, 5, 9), (12, 2, 70), (1, 33, 4), (7, 6, 6)]  # of the prompt, the chosen and the rejected answer
OBJECTIVES = [DirectPreference(beta=0.3), DirectPreference(beta=2.0, by_length=True)]


def pairs() -> list[Pair]:
    """Answers of random tokens behind prompts of random tokens, and random references."""
    rng = np.random.default_rng(0)
    found = []
    for prompt, *answers in LENGTHS:
        asked = ~rng.integers(0, END, prompt).astype(np.int32)
        chosen, rejected = (np.append(asked, rng.integers(0, END, n).astype(np.int32)) for n in answers)
        found.append(Pair(chosen, rejected, tuple(rng.normal(-50.0, 30.0, 2))))
    return found


def step_of(objective: DirectPreference, cuts: list[list[int]]) -> tuple[CausalLM, list[Losses]]:
    """A model with the gradients of a step that is cut so, and the losses of its micro batches."""
    model, given = tiny_model(dtype=torch.float64), pairs()
    parts = [PAIRS.pack([given[index] for index in cut]) for cut in cuts]
    step = TrainStep(parts, 0.0, RouterTap(model))
    found = []
    for part in parts:
        losses = objective(model, part, step)
        losses.total.backward()
        found.append(losses)
    return model, found


def log_prob(model: CausalLM, document: np.ndarray) -> Tensor:
    """The mean's numerator, token by token, of a document that stands alone."""
    ids = np.where(document < 0, ~document, document)
    batch = Batch.from_lengths(torch.from_numpy(ids.astype(np.int64)), [len(ids)])
    log_probs = model.logits(model(batch).hidden_TD).log_softmax(-1)
    return torch.stack([log_probs[place - 1, ids[place]] for place in np.flatnonzero(document >= 0)]).sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_packed_loss_and_its_gradient_are_those_of_the_formula(objective: DirectPreference) -> None:
    model, (losses,) = step_of(objective, [[0, 1, 2, 3]])
    direct, total, margins = tiny_model(dtype=torch.float64), torch.zeros((), dtype=torch.float64), []
    for (chosen, rejected, reference), (_, *counts) in zip(pairs(), LENGTHS, strict=True):
        rewards = [
            objective.beta * (log_prob(direct, answer) - was) / (count if objective.by_length else 1)
            for answer, was, count in zip((chosen, rejected), reference, counts, strict=True)
        ]
        margins.append(rewards[0] - rewards[1])
        total = total + torch.log1p(torch.exp(-margins[-1])) / len(LENGTHS)
    total.backward()
    torch.testing.assert_close(losses.total, total, rtol=1e-10, atol=0)
    values = losses.values
    torch.testing.assert_close(values["margin"], torch.stack(margins).mean().detach(), rtol=1e-10, atol=0)
    assert float(values["right"]) == sum(margin.item() > 0 for margin in margins) / len(margins)
    for (name, one), (_, other) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        if name.startswith("mtp"):
            assert one.grad is None
            continue
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10 * float(other.grad.abs().max()))


@pytest.mark.parametrize("cuts", [[[0], [1], [2], [3]], [[0, 1, 2], [3]]])
def test_the_mean_is_over_the_pairs_of_the_step_however_it_is_cut(cuts: list[list[int]]) -> None:
    for objective in OBJECTIVES:
        whole, (together,) = step_of(objective, [[0, 1, 2, 3]])
        cut, parts = step_of(objective, cuts)
        for name in ("main", "margin", "right", "chosen"):
            total = torch.stack([each.values[name] for each in parts]).sum()
            torch.testing.assert_close(total, together.values[name], rtol=1e-12, atol=1e-14)
        for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def gradient_of_inputs(model: CausalLM, batch: PairBatch, which: int) -> Tensor:
    """Of the loss of one pair with respect to every embedded row."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    labels_T, starts = batch.rows.labels_T.clone(), np.cumsum([0, *batch.rows.batch.packing.lengths])
    others = torch.ones(len(labels_T), dtype=torch.bool)
    others[starts[2 * which] : starts[2 * which + 2]] = False
    alone = replace_labels(batch, labels_T.masked_fill(others, -100))
    handle = model.model.embed_tokens.register_forward_hook(keep)
    losses = DirectPreference()(model, alone, TrainStep([alone], 0.0, RouterTap(model)))
    handle.remove()
    (gradient,) = torch.autograd.grad(losses.total, seen)
    assert gradient[~others].abs().sum() > 0
    return gradient[others]


def replace_labels(batch: PairBatch, labels_T: Tensor) -> PairBatch:
    return batch._replace(rows=batch.rows._replace(labels_T=labels_T))


def test_a_pair_has_no_gradient_in_the_loss_of_another() -> None:
    model, batch = tiny_model(dtype=torch.float64), PAIRS.pack(pairs())
    for which in range(len(LENGTHS)):
        assert gradient_of_inputs(model, batch, which).eq(0).all()


def test_the_chosen_answer_does_not_see_the_rejected_one() -> None:
    """The pair's loss joins the two answers; the model does not."""
    model, (pair, *_) = tiny_model(dtype=torch.float64), pairs()
    changed = pair._replace(rejected=np.append(pair.rejected[:-1], (pair.rejected[-1] + 1) % END).astype(np.int32))
    losses = [of_batch(model, PAIRS.pack([each])) for each in (pair, changed)]
    assert losses[0]["chosen"].equal(losses[1]["chosen"]) and not losses[0]["main"].equal(losses[1]["main"])


def of_batch(model: CausalLM, batch: PairBatch) -> dict[str, Tensor]:
    return DirectPreference()(model, batch, TrainStep([batch], 0.0, RouterTap(model))).values


def test_against_itself_a_model_starts_at_log_two_and_an_unused_adapter_changes_nothing() -> None:
    model, given = tiny_model(dtype=torch.float64), pairs()
    found = reference_scores(model, given, tokens_per_batch=60)
    batch = PAIRS.pack([pair._replace(reference=tuple(row)) for pair, row in zip(given, found, strict=True)])
    before = of_batch(model, batch)
    add_lora(model, LoraConfig())
    assert reference_scores(model, given, tokens_per_batch=60).tolist() == found.tolist()
    for values in (before, of_batch(model, batch)):
        assert math.isclose(float(values["main"]), math.log(2), rel_tol=1e-12)
        assert abs(float(values["margin"])) < 1e-10
