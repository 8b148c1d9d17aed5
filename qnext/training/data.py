"""Documents of token ids -> packed batches of exactly T tokens, in an order that a seed fixes.

Every row of a batch has a target. The last token of a document, its end token, is predicted and never an input. Long
documents are cut at the sequence length, and the pieces of all documents are shuffled, since a batch of one document
would be a poor sample. A piece longer than the rest of a batch is cut again. Each piece starts afresh, and its last row
still predicts the next token of the document. T is the number of tokens.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.model import Batch
from qnext.training.ranks import TrainingRanks

IGNORED = -100  # label of a row without a target

Document = np.ndarray  # int32 token ids; one that is not to be learnt is ~id. Of a text the end token is last.


class TrainBatch(NamedTuple):
    """Inputs and targets of one micro batch."""

    batch: Batch
    next_ids_T: Tensor  # the token after each row in its document: what the MTP module reads
    labels_T: Tensor  # what the trunk must predict: the same, or IGNORED
    mtp_labels_T: Tensor  # the token after that, IGNORED where the document has ended
    num_labels: int
    num_mtp_labels: int

    @property
    def num_tokens(self) -> int:
        return len(self.labels_T)

    def to(self, device: torch.device) -> TrainBatch:
        batch = Batch.from_lengths(self.batch.token_ids_T.to(device), self.batch.packing.lengths)
        return self._replace(
            batch=batch,
            next_ids_T=self.next_ids_T.to(device),
            labels_T=self.labels_T.to(device),
            mtp_labels_T=self.mtp_labels_T.to(device),
        )

    def cut(self, ranks: TrainingRanks) -> TrainBatch:
        """The rows that this one of several processes computes; the counts stay those of all."""
        rows = slice(*ranks.rows(self.num_tokens))
        return self._replace(
            batch=ranks.cut_rows(self.batch),
            next_ids_T=self.next_ids_T[rows],
            labels_T=self.labels_T[rows],
            mtp_labels_T=self.mtp_labels_T[rows],
        )


class DocumentRows(NamedTuple):
    """Rows start..end of a document. `end` is at most its length - 1, because the last token is no input."""

    document: Document
    start: int
    end: int


def pack(pieces: Sequence[DocumentRows]) -> TrainBatch:
    """One batch of `pieces`, in their order. A token that is not to be learnt is an input and no label.

    >>> batch = pack([DocumentRows(np.array([5, 6, 7, 9]), 0, 3)])
    >>> batch.labels_T.tolist(), batch.mtp_labels_T.tolist()
    ([6, 7, 9], [7, 9, -100])
    """
    inputs, following, labels, mtp_labels = [], [], [], []
    for coded, start, end in pieces:
        assert 0 <= start < end < len(coded)
        coded, num_rows = coded[start : end + 2], end - start
        document = np.where(coded < 0, ~coded, coded)
        targets = np.append(np.where(coded < 0, IGNORED, coded), IGNORED)
        inputs.append(document[:num_rows])
        following.append(document[1 : num_rows + 1])
        labels.append(targets[1 : num_rows + 1])
        mtp_labels.append(targets[2 : num_rows + 2])
    token_ids_T, next_ids_T, labels_T, mtp_labels_T = (
        torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (inputs, following, labels, mtp_labels)
    )
    return TrainBatch(
        batch=Batch.from_lengths(token_ids_T, [end - start for _, start, end in pieces]),
        next_ids_T=next_ids_T,
        labels_T=labels_T,
        mtp_labels_T=mtp_labels_T,
        num_labels=int((labels_T != IGNORED).sum()),
        num_mtp_labels=int((mtp_labels_T != IGNORED).sum()),
    )


class PackedStream:
    """Endless micro batches of exactly `tokens_per_batch` tokens. Each epoch has its own order.

    The order depends only on `seed`, epoch and the number of pieces, and on no library's random generator. Documents of
    fewer than two tokens have no target and are left out. Raises UsageError when no document is left.
    """

    def __init__(
        self, documents: Sequence[Document], *, tokens_per_batch: int, sequence_length: int, seed: int
    ) -> None:
        self._pieces = [
            DocumentRows(document, start, min(start + sequence_length, len(document) - 1))
            for document in documents
            for start in range(0, len(document) - 1, sequence_length)
        ]
        if not self._pieces:
            raise UsageError("no document has a token to predict; training needs text")
        self._tokens_per_batch, self._seed = tokens_per_batch, seed
        self._epoch, self._place, self._offset = 0, 0, 0
        self._order = self._epoch_order(0)
        sizes = np.array([tokens_per_batch, sequence_length, seed, len(self._pieces)], dtype=np.int64)
        self._fingerprint = zlib.crc32(sizes.tobytes())
        for document in documents:
            self._fingerprint = zlib.crc32(np.asarray(document, dtype=np.int32).tobytes(), self._fingerprint)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def num_tokens(self) -> int:
        """The number of targets in one epoch."""
        return sum(piece.end - piece.start for piece in self._pieces)

    @property
    def position(self) -> dict[str, int]:
        """The next token is `offset` of piece number `place` in the order of `epoch`. `fingerprint` is that of
        documents, seed and sizes: a position means nothing elsewhere."""
        return {
            "epoch": self._epoch,
            "place": self._place,
            "offset": self._offset,
            "fingerprint": self._fingerprint,
        }

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue at `position`. Raises CorruptCheckpoint where it was taken on other documents or sizes."""
        if position["fingerprint"] != self._fingerprint:
            raise CorruptCheckpoint(
                "the snapshot was taken with other documents, batch size, sequence length or seed; it cannot go on here"
            )
        self._epoch, self._place, self._offset = position["epoch"], position["place"], position["offset"]
        self._order = self._epoch_order(self._epoch)

    def next_batch(self) -> TrainBatch:
        pieces: list[DocumentRows] = []
        missing = self._tokens_per_batch
        while missing > 0:
            document, first, last = self._pieces[self._order[self._place]]
            start = first + self._offset
            end = min(start + missing, last)
            pieces.append(DocumentRows(document, start, end))
            missing -= end - start
            self._offset += end - start
            if end == last:
                self._next_piece()
        return pack(pieces)

    def _next_piece(self) -> None:
        self._place, self._offset = self._place + 1, 0
        if self._place == len(self._order):
            self._epoch, self._place = self._epoch + 1, 0
            self._order = self._epoch_order(self._epoch)

    def _epoch_order(self, epoch: int) -> list[int]:
        keys = [
            hashlib.blake2b(f"{self._seed}/{epoch}/{i}".encode(), digest_size=8).digest()
            for i in range(len(self._pieces))
        ]
        return sorted(range(len(keys)), key=keys.__getitem__)
