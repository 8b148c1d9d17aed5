"""Bits per byte of a model on documents, and how often its MTP draft agrees with it.

Legend: T tokens, R rows, D hidden, Y vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch, CausalLM

_CHUNK_ELEMENTS = 1 << 22


class EvalDocument(NamedTuple):
    """Token ids of a text, its end token last, and the size of the text in UTF-8."""

    token_ids: Sequence[int]
    num_bytes: int


@dataclass(frozen=True)
class Perplexity:
    """Compression of texts by a model.

    `bits_per_byte` is the code length of all documents over their bytes, so it does not depend on how text is cut into
    tokens. Every token costs -log2 of its probability, the end token included. The first token of a document, which
    nothing precedes, costs log2 of the vocabulary size. `mtp_acceptance` is the share of positions where the greedy
    draft of the MTP module equals the trunk's own greedy token, given the text up to there; None without an MTP module.
    """

    bits_per_byte: float
    nats_per_token: float  # over predicted tokens
    num_documents: int
    num_bytes: int
    num_tokens: int  # predicted ones
    mtp_acceptance: float | None

    @property
    def cost(self) -> float:
        return self.bits_per_byte

    @property
    def summary(self) -> str:
        mtp = "" if self.mtp_acceptance is None else f", MTP draft accepted {self.mtp_acceptance:.1%}"
        return f"held-out {self.bits_per_byte:.4f} bits per byte{mtp}"


class _Excerpt(NamedTuple):
    token_ids: Tensor  # inputs and the target of the last one


@torch.no_grad()
def evaluate_perplexity(
    model: CausalLM, documents: Sequence[EvalDocument], *, sequence_length: int, tokens_per_batch: int = 4096
) -> Perplexity:
    """Documents longer than `sequence_length` are read in pieces that do not see each other.

    `tokens_per_batch` changes memory and speed, not the result. Raises UsageError without a document that has bytes
    and a token, and for a token id outside the model's vocabulary.
    """
    if sequence_length < 1 or tokens_per_batch < 1:
        raise UsageError("sequence_length and tokens_per_batch must be at least 1")
    used = [document for document in documents if len(document.token_ids) >= 2 and document.num_bytes > 0]
    if not used:
        raise UsageError("nothing to evaluate: every document is empty")
    nats, num_tokens, num_agreed, num_drafts = 0.0, 0, 0, 0
    for pieces in _batches(used, sequence_length, tokens_per_batch):
        result = _evaluate(model, pieces)
        nats, num_tokens = nats + result.nats, num_tokens + result.num_tokens
        num_agreed, num_drafts = num_agreed + result.num_agreed, num_drafts + result.num_drafts
    num_bytes = sum(document.num_bytes for document in used)
    first_tokens = len(used) * math.log(model.config.vocab_size)
    return Perplexity(
        bits_per_byte=(nats + first_tokens) / math.log(2.0) / num_bytes,
        nats_per_token=nats / num_tokens,
        num_documents=len(used),
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        mtp_acceptance=num_agreed / num_drafts if num_drafts else None,
    )


def _batches(
    documents: Sequence[EvalDocument], sequence_length: int, tokens_per_batch: int
) -> Iterator[list[_Excerpt]]:
    pieces: list[_Excerpt] = []
    size = 0
    for document in documents:
        ids = torch.as_tensor(document.token_ids, dtype=torch.long)
        for start in range(0, len(ids) - 1, sequence_length):
            piece = _Excerpt(ids[start : start + sequence_length + 1])
            if pieces and size + len(piece.token_ids) - 1 > tokens_per_batch:
                yield pieces
                pieces, size = [], 0
            pieces.append(piece)
            size += len(piece.token_ids) - 1
    yield pieces


class _Sums(NamedTuple):
    nats: float
    num_tokens: int
    num_agreed: int
    num_drafts: int


def _evaluate(model: CausalLM, pieces: Sequence[_Excerpt]) -> _Sums:
    inputs_T = torch.cat([piece.token_ids[:-1] for piece in pieces])
    targets_T = torch.cat([piece.token_ids[1:] for piece in pieces])
    highest, vocab_size = int(torch.maximum(inputs_T, targets_T).max()), model.config.vocab_size
    if highest >= vocab_size:
        raise UsageError(f"token id {highest} is outside the model's vocabulary of {vocab_size}")
    inputs_T, targets_T = inputs_T.to(model.device), targets_T.to(model.device)
    batch = Batch.from_lengths(inputs_T, [len(piece.token_ids) - 1 for piece in pieces])
    trunk = model(batch)
    nats, greedy_T = _score(model, trunk.hidden_TD, targets_T)
    if model.mtp is None:
        return _Sums(nats, len(inputs_T), 0, 0)
    _, drafts_T = _score(model, model.draft_hidden(targets_T, trunk, batch), None)
    has_next = torch.ones_like(inputs_T, dtype=torch.bool)
    has_next[batch.packing.last_tokens_N] = False
    agreed = (drafts_T == greedy_T.roll(-1)) & has_next
    return _Sums(nats, len(inputs_T), int(agreed.sum()), int(has_next.sum()))


def _score(model: CausalLM, hidden_TD: Tensor, targets_T: Tensor | None) -> tuple[float, Tensor]:
    """Summed -log p of the targets in nats (0 without targets), and the most likely token of each row."""
    rows = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    nats, greedy = 0.0, []
    for start in range(0, len(hidden_TD), rows):
        logits_RY = model.logits(hidden_TD[start : start + rows])
        greedy.append(logits_RY.argmax(-1))
        if targets_T is not None:
            log_probs = logits_RY.to(torch.promote_types(logits_RY.dtype, torch.float32)).log_softmax(-1)
            nats -= float(log_probs.gather(1, targets_T[start : start + rows, None]).sum(dtype=torch.float64))
    return nats, torch.cat(greedy)
