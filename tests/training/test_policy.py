"""GSPO: the packed objective is that of the formula, an answer is alone, and a step can be cut anywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM
from qnext.training.losses import RouterTap
from qnext.training.objective import Losses, TrainStep
from qnext.training.policy import MismatchTooLarge, PolicyGradient, Rollout, group_advantages, pack_rollouts
from tests.training.models import END, tiny_model

LENGTHS = [(3, 5), (12, 70), (1, 33), (7, 6)]  # of the prompt and of the answer
ADVANTAGES = [1.0, -1.0, 0.5, -0.7]
WIDE = PolicyGradient(clip_low=0.2, clip_high=0.3, kl=0.4)


def log_probs(model: CausalLM, document: np.ndarray) -> Tensor:
    """Of the learnt tokens of a document that stands alone."""
    ids = np.where(document < 0, ~document, document)
    logits = model.logits(model(Batch.from_lengths(torch.from_numpy(ids.astype(np.int64)), [len(ids)])).hidden_TD)
    return torch.stack([logits[place - 1].log_softmax(-1)[ids[place]] for place in np.flatnonzero(document >= 0)])


def rollouts(model: CausalLM) -> list[Rollout]:
    """Random answers, as policies near that of the model would have drawn them, inside the clips and outside."""
    rng, found = np.random.default_rng(0), []
    for (prompt, answer), advantage, shift in zip(LENGTHS, ADVANTAGES, (-0.5, -0.5, 0.01, 0.1), strict=True):
        document = np.append(~rng.integers(0, END, prompt), rng.integers(0, END, answer)).astype(np.int32)
        old = log_probs(model, document).detach().numpy() + shift + rng.normal(0.0, 0.01, answer)
        found.append(Rollout(document, old, advantage, None, old + rng.normal(0.0, 0.3, answer)))
    return found


def step_of(objective: PolicyGradient, cuts: list[list[int]]) -> tuple[CausalLM, list[Losses]]:
    """A model with the gradients of a step that is cut so, and the losses of its micro batches."""
    model = tiny_model(dtype=torch.float64)
    given = rollouts(model)
    parts = [pack_rollouts([given[index] for index in cut], is_first=True) for cut in cuts]
    step = TrainStep(parts, 0.0, RouterTap(model))
    found = []
    for part in parts:
        found.append(objective(model, part, step))
        found[-1].total.backward()
    return model, found


def test_the_packed_objective_and_its_gradient_are_those_of_the_formula() -> None:
    model, (losses,) = step_of(WIDE, [[0, 1, 2, 3]])
    direct = tiny_model(dtype=torch.float64)
    objective, divergence, clipped = torch.zeros((), dtype=torch.float64), [], 0
    for rollout in rollouts(direct):
        now, old = log_probs(direct, rollout.document), torch.from_numpy(rollout.log_probs)
        s, a = (now - old).mean().exp(), rollout.advantage
        objective = objective + torch.minimum(s * a, s.clamp(1 - 0.2, 1 + 0.3) * a) / len(LENGTHS)
        clipped += (a > 0 and s.item() > 1.3) or (a < 0 and s.item() < 0.8)
        assert rollout.reference is not None
        ratio = (torch.from_numpy(rollout.reference) - now).exp()
        divergence.append(ratio - 1 - ratio.log())
    expected = -objective + 0.4 * torch.cat(divergence).mean()
    expected.backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)
    assert 0 < clipped < len(LENGTHS) and float(losses.values["clipped"]) == clipped / len(LENGTHS)
    for (name, one), (_, other) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        if not name.startswith("mtp"):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-10 * float(other.grad.abs().max()))


@pytest.mark.parametrize("cuts", [[[0], [1], [2], [3]], [[0, 1, 2], [3]]])
def test_means_are_over_the_whole_step_however_it_is_cut(cuts: list[list[int]]) -> None:
    whole, (together,) = step_of(WIDE, [[0, 1, 2, 3]])
    cut, parts = step_of(WIDE, cuts)
    for name, value in together.values.items():
        if name in ("balance", "z"):
            continue
        each = torch.stack([part.values[name] for part in parts])
        torch.testing.assert_close(each.max() if name == "mismatch_max" else each.sum(), value, rtol=1e-10, atol=1e-14)
    for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_an_answer_has_no_gradient_in_the_loss_of_another() -> None:
    model = tiny_model(dtype=torch.float64)
    given, seen = rollouts(model), []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.model.embed_tokens.register_forward_hook(keep)
    starts = np.cumsum([0, *(prompt + answer - 1 for prompt, answer in LENGTHS)])
    for which in (0, 1, 2, 3):
        batch = pack_rollouts([each._replace(advantage=float(n == which)) for n, each in enumerate(given)])
        objective = replace(WIDE, kl=0.0, clip_low=0.9, clip_high=9.0)
        (gradient,) = torch.autograd.grad(
            objective(model, batch, TrainStep([batch], 0.0, RouterTap(model))).total, seen
        )
        seen.clear()
        own = slice(starts[which], starts[which + 1])
        assert gradient[own].abs().sum() > 0
        gradient[own] = 0
        assert gradient.eq(0).all()


def replayed(model: CausalLM, *, replays: bool) -> tuple[Losses, Tensor]:
    """With experts that the model would not choose itself; and the gradient of the first router."""
    (rollout, *_) = rollouts(model)
    routing = np.tile(np.array([3, 5]), (len(rollout.document) - 1, 2, 1))
    batch = pack_rollouts([rollout._replace(routing=routing)], [0, 1], is_first=True)
    losses = PolicyGradient(replays=replays, clip_low=0.9, clip_high=9.0)(
        model, batch, TrainStep([batch], 0.0, RouterTap(model))
    )
    losses.total.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad
    assert gradient is not None
    return losses, gradient


def test_replay_takes_the_experts_of_the_rollout_by_choice() -> None:
    replay, gradient = replayed(tiny_model(dtype=torch.float64), replays=True)
    assert replay.counts_LE is not None
    assert (replay.counts_LE[:, [3, 5]] == 7).all() and replay.counts_LE.sum() == 28
    assert gradient[[3, 5]].abs().sum() > 0, "the router learns from what was replayed"
    own, _ = replayed(tiny_model(dtype=torch.float64), replays=False)
    assert own.counts_LE is not None and not torch.equal(own.counts_LE, replay.counts_LE)
    assert float(own.values["mismatch"]) != float(replay.values["mismatch"])
    for losses in (replay, own):
        assert 0.0 < float(losses.values["routing_differs"]) <= 1.0


def test_a_mismatch_above_the_limit_ends_the_step_before_an_update() -> None:
    model = tiny_model(dtype=torch.float64)
    largest = float(step_of(WIDE, [[0, 1, 2, 3]])[1][0].values["mismatch_max"])
    step_of(replace(WIDE, max_mismatch=largest * 1.0001), [[0, 1, 2, 3]])
    with pytest.raises(MismatchTooLarge, match=f"computes {largest:.3g} away from it; max_mismatch is 0.1"):
        step_of(replace(WIDE, max_mismatch=0.1), [[0, 1, 2, 3]])
    batch = pack_rollouts(rollouts(model))  # after an update a difference is what was learnt
    losses = replace(WIDE, max_mismatch=0.0)(model, batch, TrainStep([batch], 0.0, RouterTap(model)))
    assert "mismatch" not in losses.values


def test_advantages_of_a_group() -> None:
    assert group_advantages([1.0, 1.0, 1.0]) is None
    assert group_advantages([1.0, 0.0, 0.0, 1.0]) == [1.0, -1.0, -1.0, 1.0]
    found = group_advantages([3.0, 0.0, 0.0, 0.0])
    assert found is not None and abs(sum(found)) < 1e-12 and abs(found[0] - 3**0.5) < 1e-12


@pytest.mark.parametrize("wrong", [{"clip_low": 0.0}, {"clip_high": -1.0}, {"kl": -1.0}, {"max_mismatch": -1.0}])
def test_impossible_values_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        PolicyGradient(**wrong)  # type: ignore[arg-type]
