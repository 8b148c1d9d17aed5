from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnext.ops import cross_entropy_sum
from qnext.training.data import IGNORED, DocumentRows, PackedStream, TrainBatch, pack
from qnext.training.losses import (
    RouterTap,
    balance_loss,
    expert_counts,
    label_log_probs,
    router_losses,
    stack_logits,
)
from qnext.training.objective import Losses, LossPart, NextToken, TrainStep
from tests.training.models import documents, tiny_model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 0])
def test_cross_entropy_equals_torch(dtype: torch.dtype, tolerance: float, chunk_rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(65, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(31, 12, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 31, (65,))
    labels[[0, 9, 64]] = IGNORED
    upstream = 0.37
    loss = cross_entropy_sum(hidden, weight, labels, chunk_rows=chunk_rows)
    grads = torch.autograd.grad(loss * upstream, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=IGNORED, reduction="sum")
    expected_grads = torch.autograd.grad(expected * upstream, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert (grad - reference).norm() / reference.norm() < tolerance
    assert grads[0][[0, 9, 64]].abs().max() == 0


def test_cross_entropy_without_a_target_is_zero() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_cross_entropy_of_a_frozen_head() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    cross_entropy_sum(hidden, weight, torch.tensor([0, 4, 2])).backward()
    assert hidden.grad.abs().min() > 0


def probs_and_counts(tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    logits = torch.randn(3, tokens, 7, dtype=torch.float64, requires_grad=True)
    chosen = logits.topk(2, dim=-1).indices
    counts = torch.stack([torch.bincount(layer.flatten(), minlength=7) for layer in chosen])
    return logits, counts


def test_balance_loss_is_one_when_balanced() -> None:
    probs = torch.full((2, 10, 5), 0.2)
    assert balance_loss(probs, torch.full((2, 5), 4)).item() == pytest.approx(1.0)
    one_expert = torch.zeros(2, 10, 5)
    one_expert[..., 3] = 1.0
    assert balance_loss(one_expert, one_expert.sum(1)).item() == pytest.approx(5.0)


def test_balance_loss_with_counts_of_the_step_does_not_depend_on_the_cut() -> None:
    logits, counts = probs_and_counts(24)
    whole = balance_loss(logits.softmax(-1), counts)
    (expected,) = torch.autograd.grad(whole, logits)
    parts = [balance_loss(logits[:, a : a + 6].softmax(-1), counts) / 4 for a in range(0, 24, 6)]
    (grad,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-15)


def test_router_losses_by_their_formulas() -> None:
    logits, counts = probs_and_counts(11)
    balance, z = router_losses(logits, counts)
    share = counts.double() / counts.sum(-1, keepdim=True)
    expected = sum(7 * (share[layer] * logits[layer].softmax(-1).mean(0)).sum() for layer in range(3)) / 3
    torch.testing.assert_close(balance, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(z, logits.logsumexp(-1).square().mean(), rtol=1e-12, atol=0)


def batches(count: int, *, size: int = 40) -> list[TrainBatch]:
    stream = PackedStream(documents([30, 9, 17, 5, 23]), tokens_per_batch=size, sequence_length=16, seed=0)
    return [stream.next_batch() for _ in range(count)]


def joined(parts: list[TrainBatch]) -> TrainBatch:
    """The same sequences in one micro batch."""

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    lengths = [length for part in parts for length in part.batch.packing.lengths]
    token_ids = torch.cat([part.batch.token_ids_T for part in parts])
    return TrainBatch(
        type(parts[0].batch).from_lengths(token_ids, lengths),
        cat("next_ids_T"),
        cat("labels_T"),
        cat("mtp_labels_T"),
        sum(part.num_labels for part in parts),
        sum(part.num_mtp_labels for part in parts),
    )


def gradients(
    parts: list[TrainBatch], objective: NextToken, *, exact_counts: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients and losses of one optimiser step in fp64.

    With `exact_counts` a first pass counts the experts of all micro batches, which is what the running counts
    approximate: a batch sees the others' counts beside its own.
    """
    model = tiny_model(dtype=torch.float64)
    step = TrainStep(parts, 0.0, RouterTap(model))
    own = [objective(model, part, step).counts_LE for part in parts] if exact_counts else []
    sums: dict[str, Tensor] = {}
    before: Tensor | None = None
    for index, part in enumerate(parts):
        others = [counts for other, counts in enumerate(own) if other != index and counts is not None]
        seen = torch.stack(others).sum(0) if others else before
        result = objective(model, part, step._replace(counts_LE=seen))
        result.total.backward()
        for name, value in result.values.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value
        assert result.counts_LE is not None
        before = result.counts_LE if before is None else before + result.counts_LE
    return [p.grad for p in model.parameters()], sums


def relative_error(grads: list[Tensor], expected: list[Tensor]) -> float:
    difference = sum((a - b).square().sum() for a, b in zip(grads, expected, strict=True))
    return float((difference / sum(b.square().sum() for b in expected)).sqrt())


def test_accumulation_equals_one_batch() -> None:
    parts = batches(3)
    weights = NextToken(0.5, 0.01, 0.3)
    grads, sums = gradients(parts, weights, exact_counts=True)
    expected, expected_sums = gradients([joined(parts)], weights, exact_counts=False)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-12, atol=0)
    assert relative_error(grads, expected) < 1e-11


def test_running_counts_are_exact_for_one_micro_batch_and_close_for_more() -> None:
    weights = NextToken(0.5, 0.0, 0.0)
    single = batches(1)
    running = gradients(single, weights, exact_counts=False)
    exact = gradients(single, weights, exact_counts=True)
    assert running[1] == exact[1]
    twice = [single[0], single[0]]
    torch.testing.assert_close(
        gradients(twice, weights, exact_counts=False)[1], exact[1], rtol=1e-12, atol=0, msg="equal micro batches"
    )
    several = batches(3)
    running, exact = (gradients(several, weights, exact_counts=is_exact) for is_exact in (False, True))
    difference = running[1]["balance"] - exact[1]["balance"]
    assert 0 < difference.abs() < 0.2


def test_losses_equal_plain_formulas() -> None:
    (part,) = batches(1)
    model = tiny_model(dtype=torch.float64)
    result = NextToken(0.0, 0.0, 0.3)(model, part, TrainStep([part], 0.0, RouterTap(model)))
    trunk = model(part.batch)
    main = F.cross_entropy(model.logits(trunk.hidden_TD), part.labels_T)
    draft = model.logits(model.draft_hidden(part.next_ids_T, trunk, part.batch))
    mtp = F.cross_entropy(draft, part.mtp_labels_T, ignore_index=IGNORED)
    torch.testing.assert_close(result.values["main"], main.detach(), rtol=1e-12, atol=0, check_dtype=True)
    torch.testing.assert_close(result.total, main + 0.3 * mtp, rtol=1e-12, atol=0)


def test_several_mtp_steps_equal_drafting_token_by_token() -> None:
    """Documents one by one: from the second step on, the rows before are the module's own."""
    lengths = [9, 2, 14]
    part = pack([DocumentRows(document, 0, len(document) - 1) for document in documents(lengths)])
    model = tiny_model(dtype=torch.float64)
    step = TrainStep([part], 0.0, RouterTap(model))
    result, once = (NextToken(0.5, 0.1, 0.3, mtp_steps=steps)(model, part, step) for steps in (3, 1))
    assert all(torch.equal(result.values[name], once.values[name]) for name in ("balance", "z"))
    assert torch.equal(result.counts_LE, once.counts_LE)  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64)
    for document in documents(lengths):
        alone = pack([DocumentRows(document, 0, len(document) - 1)])
        trunk = model(alone.batch)
        rows = source = model.draft_source(trunk)
        for _ in range(3):
            draft = model.draft_step(alone.next_ids_T, rows, alone.batch)
            total = total + F.cross_entropy(
                model.logits(draft), alone.mtp_labels_T, ignore_index=IGNORED, reduction="sum"
            )
            rows = torch.cat([source[:1], draft[:-1]])
    torch.testing.assert_close(result.values["mtp"], total.detach() / (3 * part.num_mtp_labels), rtol=1e-12, atol=0)


def test_detached_trunk_gets_no_gradient_of_the_mtp_loss() -> None:
    parts = batches(1)
    alone = NextToken(0.0, 0.0, 0.0)
    detached = NextToken(0.0, 0.0, 0.3, detach_trunk=True)
    attached = NextToken(0.0, 0.0, 0.3)
    names = [name for name, _ in tiny_model().named_parameters()]
    by_weights = [
        dict(zip(names, gradients(parts, weights, exact_counts=False)[0], strict=True))
        for weights in (alone, detached, attached)
    ]
    for name in names:
        if name.startswith("model.layers"):
            assert torch.equal(by_weights[0][name], by_weights[1][name]), name
            assert not torch.equal(by_weights[0][name], by_weights[2][name]), name
        if name.startswith("mtp"):
            assert by_weights[0][name] is None and by_weights[1][name].abs().max() > 0, name


def test_expert_counts_by_hand() -> None:
    model = tiny_model()
    tap = RouterTap(model)
    part = pack([DocumentRows(documents([12])[0], 0, 11), DocumentRows(documents([9], seed=1)[0], 0, 8)])
    trunk = model(part.batch)
    model.draft_hidden(part.next_ids_T, trunk, part.batch)
    outputs = tap.take()
    assert len(outputs) == 3  # two layers and the MTP layer
    counts = expert_counts(outputs, num_experts=6)
    for layer, output in enumerate(outputs):
        expected = [0] * 6
        for row in output.routing.experts_TA.tolist():
            for expert in row:
                expected[expert] += 1
        assert counts[layer].tolist() == expected
        assert sum(expected) == 19 * 2
    assert stack_logits(outputs).shape == (3, 19, 6)
    assert tap.take() == []
    with torch.no_grad():
        model(part.batch)
    assert tap.take() == []
    tap.close()
    model(part.batch)
    assert tap.take() == []


def test_the_total_is_the_weighted_sum_of_the_parts() -> None:
    values = {name: torch.tensor(n, requires_grad=True) for name, n in (("a", 2.0), ("b", 3.0), ("c", 5.0))}
    losses = Losses({"a": LossPart(values["a"]), "b": LossPart(values["b"], 0.5), "c": LossPart(values["c"], 0.0)})
    assert losses.total.item() == 3.5
    losses.total.backward()
    assert [value.grad and value.grad.item() for value in values.values()] == [1.0, 0.5, None]
    assert {name: (value.item(), value.requires_grad) for name, value in losses.values.items()} == {
        "a": (2.0, False),
        "b": (3.0, False),
        "c": (5.0, False),
    }


def test_chunks_ask_for_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that do so at the same time can block each other for ever, inside torch."""

    def refuse(*arguments: object) -> None:
        raise AssertionError

    model = tiny_model()
    monkeypatch.setattr(torch, "get_rng_state", refuse)
    label_log_probs(model, torch.ones(3, 24, requires_grad=True), torch.tensor([1, 2, 3])).sum().backward()
