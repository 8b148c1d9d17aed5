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
from qnext.eval.intervals import Interval, ratio_interval
from qnext.model import Batch, CausalLM

CHUNK_ELEMENTS = 1 << 22


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


@dataclass(frozen=True)
class PerplexityByDocument:
    """All documents together, and each one alone in their order. The interval is of 95 %, from how documents differ."""

    total: Perplexity
    documents: tuple[Perplexity, ...]
    bits_per_byte: Interval


class _Excerpt(NamedTuple):
    token_ids: Tensor  # inputs and the target of the last one
    document: int


def evaluate_perplexity(
    model: CausalLM, documents: Sequence[EvalDocument], *, sequence_length: int, tokens_per_batch: int = 4096
) -> Perplexity:
    """Documents longer than `sequence_length` are read in pieces that do not see each other.

    `tokens_per_batch` changes memory and speed, not the result. Raises UsageError without a document that has bytes
    and a token, and for a token id outside the model's vocabulary.
    """
    return evaluate_documents(
        model, documents, sequence_length=sequence_length, tokens_per_batch=tokens_per_batch
    ).total


@torch.no_grad()
def evaluate_documents(
    model: CausalLM, documents: Sequence[EvalDocument], *, sequence_length: int, tokens_per_batch: int = 4096
) -> PerplexityByDocument:
    """As evaluate_perplexity, with each document that has bytes and a token."""
    if sequence_length < 1 or tokens_per_batch < 1:
        raise UsageError("sequence_length and tokens_per_batch must be at least 1")
    used = [document for document in documents if len(document.token_ids) >= 2 and document.num_bytes > 0]
    if not used:
        raise UsageError("nothing to evaluate: every document is empty")
    sums = [_Sums() for _ in used]
    for pieces in batches(used, sequence_length, tokens_per_batch):
        _evaluate(model, pieces, sums)
    first_token = math.log(model.config.vocab_size)
    sizes = [document.num_bytes for document in used]
    bits = [(each.nats + first_token) / math.log(2.0) for each in sums]
    return PerplexityByDocument(
        _perplexity(sums, sizes, bits),
        tuple(_perplexity([each], [size], [cost]) for each, size, cost in zip(sums, sizes, bits, strict=True)),
        ratio_interval(bits, [float(size) for size in sizes]),
    )


def _perplexity(sums: Sequence[_Sums], sizes: Sequence[int], bits: Sequence[float]) -> Perplexity:
    num_tokens, num_drafts = sum(each.num_tokens for each in sums), sum(each.num_drafts for each in sums)
    return Perplexity(
        bits_per_byte=sum(bits) / sum(sizes),
        nats_per_token=sum(each.nats for each in sums) / num_tokens,
        num_documents=len(sums),
        num_bytes=sum(sizes),
        num_tokens=num_tokens,
        mtp_acceptance=sum(each.num_agreed for each in sums) / num_drafts if num_drafts else None,
    )


def batches(documents: Sequence[EvalDocument], sequence_length: int, tokens_per_batch: int) -> Iterator[list[_Excerpt]]:
    pieces: list[_Excerpt] = []
    size = 0
    for number, document in enumerate(documents):
        ids = torch.as_tensor(document.token_ids, dtype=torch.long)
        for start in range(0, len(ids) - 1, sequence_length):
            piece = _Excerpt(ids[start : start + sequence_length + 1], number)
            if pieces and size + len(piece.token_ids) - 1 > tokens_per_batch:
                yield pieces
                pieces, size = [], 0
            pieces.append(piece)
            size += len(piece.token_ids) - 1
    yield pieces


@dataclass
class _Sums:
    """Of one document."""

    nats: float = 0.0
    num_tokens: int = 0
    num_agreed: int = 0
    num_drafts: int = 0


def _evaluate(model: CausalLM, pieces: Sequence[_Excerpt], sums: Sequence[_Sums]) -> None:
    """Add what each piece costs to the sums of its document."""
    inputs_T = torch.cat([piece.token_ids[:-1] for piece in pieces])
    targets_T = torch.cat([piece.token_ids[1:] for piece in pieces])
    highest, vocab_size = int(torch.maximum(inputs_T, targets_T).max()), model.config.vocab_size
    if highest >= vocab_size:
        raise UsageError(f"token id {highest} is outside the model's vocabulary of {vocab_size}")
    inputs_T, targets_T = inputs_T.to(model.device), targets_T.to(model.device)
    lengths = [len(piece.token_ids) - 1 for piece in pieces]
    batch = Batch.from_lengths(inputs_T, lengths)
    trunk = model(batch)
    nats_T, greedy_T = _score(model, trunk.hidden_TD, targets_T)
    agreed_T = has_next_T = None
    if model.mtp is not None:
        _, drafts_T = _score(model, model.draft_hidden(targets_T, trunk, batch), None)
        has_next_T = torch.ones_like(inputs_T, dtype=torch.bool)
        has_next_T[batch.packing.last_tokens_N] = False
        agreed_T = (drafts_T == greedy_T.roll(-1)) & has_next_T
    start = 0
    for piece, length in zip(pieces, lengths, strict=True):
        rows, into = slice(start, start + length), sums[piece.document]
        into.nats += float(nats_T[rows].sum())
        into.num_tokens += length
        if agreed_T is not None and has_next_T is not None:
            into.num_agreed += int(agreed_T[rows].sum())
            into.num_drafts += int(has_next_T[rows].sum())
        start += length


def _score(model: CausalLM, hidden_TD: Tensor, targets_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """-log p of each target in nats (none without targets), and the most likely token of each row."""
    rows = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    nats, greedy = [], []
    for start in range(0, len(hidden_TD), rows):
        logits_RY = model.logits(hidden_TD[start : start + rows])
        greedy.append(logits_RY.argmax(-1))
        if targets_T is not None:
            log_probs = logits_RY.to(torch.promote_types(logits_RY.dtype, torch.float32)).log_softmax(-1)
            nats.append(-log_probs.gather(1, targets_T[start : start + rows, None])[:, 0].double())
    return torch.cat(nats) if nats else torch.empty(0), torch.cat(greedy)
