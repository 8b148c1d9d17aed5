from __future__ import annotations

import numpy as np
import pytest

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.training.data import IGNORED, DocumentRows, PackedStream, pack
from tests.training.models import END, documents


def stream(docs: list[np.ndarray], *, size: int = 17, sequence_length: int = 8, seed: int = 3) -> PackedStream:
    return PackedStream(docs, tokens_per_batch=size, sequence_length=sequence_length, seed=seed)


def test_pack_targets() -> None:
    first, second = np.array([1, 2, 3, 4, 9], dtype=np.int32), np.array([5, 6, 7, 8, 9], dtype=np.int32)
    batch = pack([DocumentRows(first, 1, 4), DocumentRows(second, 0, 2)])
    assert batch.batch.packing.lengths == (3, 2)
    assert batch.batch.token_ids_T.tolist() == [2, 3, 4, 5, 6]
    assert batch.batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.next_ids_T.tolist() == batch.labels_T.tolist() == [3, 4, 9, 6, 7]
    # The first piece reaches the end of its document, the second is cut and still has a token two ahead.
    assert batch.mtp_labels_T.tolist() == [4, 9, IGNORED, 7, 8]
    assert (batch.num_labels, batch.num_mtp_labels) == (5, 4)


def test_every_target_comes_once_per_epoch_in_batches_of_one_size() -> None:
    docs = documents([2, 30, 9, 1, 17, 5, 23])
    packed = stream(docs)
    assert packed.num_tokens == sum(len(d) - 1 for d in docs)
    inputs: list[int] = []
    labels: list[int] = []
    while len(inputs) < 3 * packed.num_tokens:
        batch = packed.next_batch()
        assert len(batch.labels_T) == 17 == batch.num_labels
        assert max(batch.batch.packing.lengths) <= 8
        assert batch.num_mtp_labels == int((batch.mtp_labels_T != IGNORED).sum())
        inputs += batch.batch.token_ids_T.tolist()
        labels += batch.labels_T.tolist()
    rows = sorted((token, label) for d in docs for token, label in zip(d[:-1].tolist(), d[1:].tolist(), strict=True))
    epochs = [slice(n * packed.num_tokens, (n + 1) * packed.num_tokens) for n in range(3)]
    for epoch in epochs:
        assert sorted(zip(inputs[epoch], labels[epoch], strict=True)) == rows
    assert len({tuple(inputs[epoch]) for epoch in epochs}) == 3


def test_pieces_of_long_documents_are_shuffled_among_the_others() -> None:
    """A long document must not fill batch after batch: its pieces lie apart."""
    docs = [np.array([n] * 801 + [END], dtype=np.int32) for n in range(4)]
    packed = PackedStream(docs, tokens_per_batch=32, sequence_length=8, seed=0)
    mixed = [len(set(packed.next_batch().batch.token_ids_T.tolist())) for _ in range(100)]
    assert np.mean(mixed) > 2.5


def test_order_depends_on_the_seed_alone() -> None:
    docs = documents([30, 9, 17, 5, 23])
    first, again, other = (stream(docs, seed=s).next_batch().labels_T.tolist() for s in (3, 3, 4))
    assert first == again != other


def test_position_continues_the_same_stream() -> None:
    docs = documents([30, 9, 17, 5, 23])
    straight, resumed = stream(docs), stream(docs)
    for _ in range(11):
        straight.next_batch()
    resumed.seek(straight.position)
    for _ in range(9):
        a, b = straight.next_batch(), resumed.next_batch()
        assert a.batch.token_ids_T.tolist() == b.batch.token_ids_T.tolist()
        assert a.mtp_labels_T.tolist() == b.mtp_labels_T.tolist()
        assert a.batch.packing.lengths == b.batch.packing.lengths


@pytest.mark.parametrize("change", [{"seed": 4}, {"size": 18}, {"sequence_length": 9}])
def test_position_of_another_run_is_refused(change: dict[str, int]) -> None:
    docs = documents([30, 9])
    with pytest.raises(CorruptCheckpoint, match="other documents"):
        stream(docs, **change).seek(stream(docs).position)
    altered = [docs[0], docs[1].copy()]
    altered[1][2] = (altered[1][2] + 1) % END
    with pytest.raises(CorruptCheckpoint, match="other documents"):
        stream(altered).seek(stream(docs).position)


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UsageError, match="no document"):
        stream(documents([1, 1]))
