"""Packed documents never see each other: the heart of training on packed text."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qnext.model import Batch, CausalLM
from qnext.ops import cross_entropy_sum
from qnext.training.data import DocumentRows, TrainBatch, pack
from tests.training.models import documents, tiny_model

LENGTHS = ([5, 40, 2, 67, 3], [33, 33, 33], [2, 2, 65])


def packed(lengths: list[int]) -> tuple[TrainBatch, list[TrainBatch]]:
    """All documents together, and each alone."""
    pieces = [DocumentRows(document, 0, len(document) - 1) for document in documents(lengths)]
    return pack(pieces), [pack([piece]) for piece in pieces]


def outputs(model: CausalLM, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Logits of trunk and of the MTP module."""
    trunk = model(batch.batch)
    draft = model.draft_hidden(batch.next_ids_T, trunk, batch.batch)
    return model.logits(trunk.hidden_TD), model.logits(draft)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_packed_equals_alone(lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(dtype=dtype)
    together, alone = packed(lengths)
    with torch.no_grad():
        results = outputs(model, together)
        separate = [outputs(model, batch) for batch in alone]
    for kind, joined in enumerate(results):
        expected = torch.cat([parts[kind] for parts in separate])
        assert (joined - expected).norm() / expected.norm() < tolerance


def gradient_by_row(model: CausalLM, batch: TrainBatch, rows: slice, *, through_mtp: bool) -> tuple[Tensor, Tensor]:
    """Gradient of the loss of `rows` with respect to the embedded inputs, and to the embedded next tokens."""
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    handle = model.model.embed_tokens.register_forward_hook(keep)
    trunk = model(batch.batch)
    draft = model.draft_hidden(batch.next_ids_T, trunk, batch.batch)
    handle.remove()
    hidden, labels = (draft, batch.mtp_labels_T) if through_mtp else (trunk.hidden_TD, batch.labels_T)
    loss = cross_entropy_sum(hidden[rows], model.lm_head.weight, labels[rows])
    inputs, following = torch.autograd.grad(loss, seen, allow_unused=not through_mtp)
    return inputs, torch.zeros_like(inputs) if following is None else following


@pytest.mark.parametrize("through_mtp", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_document_has_no_gradient_in_another(lengths: list[int], through_mtp: bool) -> None:
    model = tiny_model(dtype=torch.float64)
    together, _ = packed(lengths)
    starts = [sum(n - 1 for n in lengths[:i]) for i in range(len(lengths) + 1)]
    for start, end in itertools.pairwise(starts):
        inputs, following = gradient_by_row(model, together, slice(start, end), through_mtp=through_mtp)
        for gradient in (inputs, following):
            outside = torch.cat([gradient[:start], gradient[end:]])
            assert outside.eq(0).all()
        if end - start > 2:
            assert inputs[start:end].abs().sum(-1).gt(0)[:-1].all()


def test_a_later_token_has_no_gradient_in_an_earlier_loss() -> None:
    model = tiny_model(dtype=torch.float64)
    together, _ = packed([70])
    inputs, following = gradient_by_row(model, together, slice(0, 31), through_mtp=True)
    assert inputs[31:].eq(0).all() and following[31:].eq(0).all()
    assert inputs[:31].abs().sum(-1).gt(0).all()


def test_the_mtp_target_never_comes_from_the_next_document() -> None:
    first, second = documents([6, 6])
    batch = pack([DocumentRows(first, 0, 5), DocumentRows(second, 0, 5)])
    assert batch.mtp_labels_T[:4].tolist() == first[2:].tolist()
    assert batch.mtp_labels_T[4].item() == -100
    assert isinstance(batch.batch, Batch)


@pytest.mark.parametrize("optimizer_rows", [slice(0, 10)])
def test_the_check_itself_sees_a_leak(optimizer_rows: slice) -> None:
    """One long document in place of two: the same measurement must then find gradients across the border."""
    model = tiny_model(dtype=torch.float64)
    (document,) = documents([30])
    batch = pack([DocumentRows(document, 0, 29)])
    inputs, _ = gradient_by_row(model, batch, slice(10, 29), through_mtp=False)
    assert inputs[optimizer_rows].abs().sum(-1).gt(0).all()
