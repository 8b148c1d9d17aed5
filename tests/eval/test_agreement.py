"""What a model lost: nothing against itself, and against another what the logits say row by row."""

from __future__ import annotations

import math

import pytest
import torch

from qnext.eval import EvalDocument
from qnext.eval.agreement import measure_loss
from qnext.model import Batch
from tests.training.models import documents, tiny_model


@torch.no_grad()
def test_a_model_against_itself_and_another() -> None:
    one, other = tiny_model(seed=0), tiny_model(seed=1)
    docs = [EvalDocument(ids.tolist(), 50) for ids in documents([23, 9, 31])]
    same = measure_loss("same", one, docs, num_bytes=1, reference=one, sequence_length=16)
    assert same.text is not None and same.text.kl_mean == 0 and same.text.greedy_agreement == 1
    found = measure_loss("other", other, docs, num_bytes=1, reference=one, sequence_length=16)
    kl, equal, rows = 0.0, 0, 0
    for document in docs:
        for start in range(0, len(document.token_ids) - 1, 16):
            ids = torch.tensor(document.token_ids[start : start + 17][:-1])
            p, q = (m.logits(m(Batch.from_lengths(ids, [len(ids)])).hidden_TD).log_softmax(-1) for m in (one, other))
            kl += float((p.exp() * (p - q)).sum())
            equal += int((p.argmax(-1) == q.argmax(-1)).sum())
            rows += len(ids)
    assert found.text is not None and found.text.num_tokens == rows
    assert found.text.kl_mean == pytest.approx(kl / rows, rel=1e-4) and found.text.greedy_agreement == equal / rows
    nats = found.perplexity.total.nats_per_token
    assert math.log(found.text.perplexity_quantized) == pytest.approx(nats, rel=1e-5)
    assert measure_loss("reference", one, docs, num_bytes=1).text is None
