"""What a model lost against a reference on the same texts: bits per byte, KL divergence, the most likely token.

Legend: T tokens, R rows, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qnext.eval.perplexity import CHUNK_ELEMENTS, EvalDocument, PerplexityByDocument, batches, evaluate_documents
from qnext.model import Batch, CausalLM
from qnext.quant.report import TextComparison, TextQuality


@dataclass(frozen=True)
class ModelLoss:
    """A model beside its reference; `text` is None for the reference itself."""

    name: str
    num_bytes: int  # of its weights as stored
    perplexity: PerplexityByDocument
    text: TextQuality | None


@torch.no_grad()
def measure_loss(
    name: str,
    model: CausalLM,
    documents: Sequence[EvalDocument],
    *,
    num_bytes: int,
    reference: CausalLM | None = None,
    sequence_length: int = 2048,
) -> ModelLoss:
    """Both models must have one vocabulary."""
    perplexity = evaluate_documents(model, documents, sequence_length=sequence_length)
    if reference is None:
        return ModelLoss(name, num_bytes, perplexity, None)
    comparison = TextComparison()
    for pieces in batches(documents, sequence_length, 4096):
        inputs_T = torch.cat([piece.token_ids[:-1] for piece in pieces]).to(model.device)
        targets_T = torch.cat([piece.token_ids[1:] for piece in pieces]).to(model.device)
        batch = Batch.from_lengths(inputs_T, [len(piece.token_ids) - 1 for piece in pieces])
        _add(comparison, reference, model, batch, targets_T)
    return ModelLoss(name, num_bytes, perplexity, comparison.result())


def _add(comparison: TextComparison, reference: CausalLM, model: CausalLM, batch: Batch, targets_T: Tensor) -> None:
    hidden_TD, other_TD = reference(batch).hidden_TD, model(batch).hidden_TD
    rows = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    for start in range(0, len(targets_T), rows):
        some = slice(start, start + rows)
        comparison.add_logits(reference.logits(hidden_TD[some]), model.logits(other_TD[some]), targets_T[some])
