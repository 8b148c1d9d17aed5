from __future__ import annotations

import math

import pytest
import torch

from qnext.errors import UsageError
from qnext.eval import EvalDocument, evaluate_perplexity
from qnext.model import Batch, CausalLM
from tests.training.models import VOCAB, documents, tiny_model


def by_hand(model: CausalLM, ids: list[int], *, sequence_length: int) -> tuple[float, int, int]:
    """(nats of every token but the first, drafts that agree, drafts), one document piece at a time, row by row."""
    nats, agreed, drafts = 0.0, 0, 0
    for start in range(0, len(ids) - 1, sequence_length):
        piece = torch.tensor(ids[start : start + sequence_length + 1])
        batch = Batch.from_lengths(piece[:-1], [len(piece) - 1])
        trunk = model(batch)
        logits = model.logits(trunk.hidden_TD)
        for row, target in enumerate(piece[1:].tolist()):
            nats -= float(logits[row].log_softmax(-1)[target])
        if model.mtp is not None:
            draft = model.logits(model.draft_hidden(piece[1:], trunk, batch)).argmax(-1).tolist()
            greedy = logits.argmax(-1).tolist()
            agreed += sum(draft[row] == greedy[row + 1] for row in range(len(draft) - 1))
            drafts += len(draft) - 1
    return nats, agreed, drafts


@pytest.mark.parametrize("sequence_length", [1, 7, 100])
@pytest.mark.parametrize("num_mtp", [0, 1])
@torch.no_grad()
def test_equals_one_document_at_a_time(sequence_length: int, num_mtp: int) -> None:
    model = tiny_model(dtype=torch.float64, num_nextn_predict_layers=num_mtp)
    docs = [EvalDocument(ids.tolist(), 3 * len(ids) + 1) for ids in documents([23, 2, 40, 8])]
    result = evaluate_perplexity(model, docs, sequence_length=sequence_length, tokens_per_batch=30)
    parts = [by_hand(model, list(d.token_ids), sequence_length=sequence_length) for d in docs]
    nats, agreed, drafts = (sum(part[i] for part in parts) for i in range(3))
    num_bytes = sum(d.num_bytes for d in docs)
    assert result.num_tokens == 22 + 1 + 39 + 7
    assert (result.num_documents, result.num_bytes) == (4, num_bytes)
    assert result.nats_per_token == pytest.approx(nats / result.num_tokens, rel=1e-12)
    expected = (nats / math.log(2) + 4 * math.log2(VOCAB)) / num_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-12)
    assert result.mtp_acceptance == (pytest.approx(agreed / drafts) if drafts else None)


def test_batch_size_does_not_matter() -> None:
    model = tiny_model(dtype=torch.float64)
    docs = [EvalDocument(ids.tolist(), 50) for ids in documents([23, 2, 40, 8])]
    results = [evaluate_perplexity(model, docs, sequence_length=9, tokens_per_batch=size) for size in (1, 17, 4096)]
    for result in results[1:]:
        assert result.bits_per_byte == pytest.approx(results[0].bits_per_byte, rel=1e-12)
        assert result.mtp_acceptance == results[0].mtp_acceptance


def test_a_uniform_model_costs_the_size_of_its_vocabulary() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    (ids,) = documents([31])
    result = evaluate_perplexity(model, [EvalDocument(ids.tolist(), 31)], sequence_length=64)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB), rel=1e-6)


@pytest.mark.parametrize(
    ("docs", "message"),
    [
        ([], "nothing to evaluate"),
        ([EvalDocument([1], 3), EvalDocument([1, 2], 0)], "nothing to evaluate"),
        ([EvalDocument([1, VOCAB, 2], 3)], "outside"),
    ],
)
def test_bad_documents_are_refused(docs: list[EvalDocument], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_perplexity(tiny_model(), docs, sequence_length=8)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="sequence_length"):
        evaluate_perplexity(tiny_model(), [EvalDocument([1, 2], 3)], sequence_length=0)
