"""Streams of whole samples, and the shards that they are read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qnext.errors import CorruptCheckpoint, UsageError
from qnext.text.lessons import Lesson
from qnext.training.data import IGNORED, DocumentRows, pack
from qnext.training.samples import SampleSet, SampleStream, coded, pieces
from qnext.training.shards import DataShard, write_shard
from tests.training.models import END


def samples(lengths: list[int], *, seed: int = 0) -> list[np.ndarray]:
    """Of these lengths; some half of the tokens is learnt, the last one always."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids, is_learned = rng.integers(0, END, length).astype(np.int32), rng.random(length) < 0.5
        is_learned[0], is_learned[-1] = False, True
        found.append(np.where(is_learned, ids, ~ids))
    return found


def stream(*sets: list[np.ndarray], size: int = 40, seed: int = 3, **more: object) -> SampleStream:
    return SampleStream(
        [SampleSet([each]) for each in sets],
        tokens_per_batch=size,
        seed=seed,
        fingerprint="f",
        **more,  # type: ignore[arg-type]
    )


def test_what_is_not_learnt_is_an_input_and_no_label() -> None:
    first, second = np.array([~1, ~2, 3, ~4, 9], np.int32), np.array([~5, 6, 7], np.int32)
    batch = pack([DocumentRows(first, 0, 4), DocumentRows(second, 0, 2)])
    assert batch.batch.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.next_ids_T.tolist() == [2, 3, 4, 9, 6, 7]
    assert batch.labels_T.tolist() == [IGNORED, 3, IGNORED, 9, 6, 7]
    assert batch.mtp_labels_T.tolist() == [3, IGNORED, 9, IGNORED, 7, IGNORED]
    assert (batch.num_labels, batch.num_mtp_labels, batch.num_tokens) == (4, 3, 6)


def test_a_lesson_ends_with_its_last_learnt_token() -> None:
    document = coded(Lesson([5, 6, 7, 8], [True, True, True, False]))
    assert document.tolist() == [~5, 6, 7]


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 30])
def test_pieces_of_a_text_learn_every_token_once(length: int) -> None:
    ids = np.arange(1, length + 1)
    found = list(pieces(ids.tolist(), num_rows=8))
    assert all(2 <= len(piece) <= 9 and piece[0] < 0 for piece in found)
    assert np.concatenate([piece[1:] for piece in found]).tolist() == ids[1:].tolist()
    assert [int(~piece[0]) for piece in found] == [ids[n] for n in range(0, length - 1, 8)]


def test_every_sample_comes_whole_and_once_an_epoch() -> None:
    given = samples([2, 30, 9, 3, 17, 5, 23, 40, 41])
    whole = stream(given)
    assert whole.num_tokens == sum(len(each) - 1 for each in given)
    seen: list[tuple[int, ...]] = []
    while len(seen) < 3 * len(given):
        batch = whole.next_batch()
        assert batch.num_tokens <= 40
        ids = batch.batch.token_ids_T.split(list(batch.batch.packing.lengths))
        seen += [tuple(part.tolist()) for part in ids]
    epochs = [seen[start : start + len(given)] for start in range(0, 3 * len(given), len(given))]
    wanted = sorted(tuple(np.where(each < 0, ~each, each)[:-1].tolist()) for each in given)
    assert all(sorted(epoch) == wanted for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(UsageError, match="a sample of 49 tokens is longer than a batch of 40"):
        stream(samples([50])).next_batch()


@pytest.mark.parametrize("num_before", [0, 1, 7, 30])
def test_a_position_continues_the_same_stream(num_before: int) -> None:
    sets = samples([30, 9, 17, 5, 23]), samples([7, 8, 9], seed=1)
    straight, resumed = stream(*sets), stream(*sets)
    for _ in range(num_before):
        straight.next_batch()
    resumed.seek(straight.position)
    for _ in range(9):
        one, other = straight.next_batch(), resumed.next_batch()
        assert one.batch.token_ids_T.tolist() == other.batch.token_ids_T.tolist()
        assert one.labels_T.tolist() == other.labels_T.tolist()
    assert straight.position == resumed.position


def test_a_position_of_another_run_is_refused() -> None:
    given = samples([30, 9])
    position = stream(given).position
    for other in (stream(given, seed=4), stream(given, size=41), stream(given, weights=[2.0])):
        with pytest.raises(CorruptCheckpoint, match="other data"):
            other.seek(position)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [5.0, 1.0]])
def test_sources_are_mixed_by_their_weights(weights: list[float] | None) -> None:
    sets = samples([9] * 40), samples([5] * 20, seed=1)
    mixed = stream(*sets, weights=weights)
    share = 40 * 8 / (40 * 8 + 20 * 4) if weights is None else weights[0] / sum(weights)
    rows = [0, 0]
    for _ in range(50):
        for length in mixed.next_batch().batch.packing.lengths:
            rows[length != 8] += length
        # never further from the share than by one sample
        assert abs(rows[0] - share * sum(rows)) <= 9


def test_impossible_weights_are_refused() -> None:
    for weights in ([1.0], [1.0, 0.0], [1.0, -2.0]):
        with pytest.raises(UsageError, match="2 sources need as many weights above zero"):
            stream(samples([9]), samples([9]), weights=weights)


def test_batches_of_an_epoch_are_counted() -> None:
    given = samples([30, 9, 17, 5, 23])
    for epochs in (0.5, 1.0, 3.0):
        count = stream(given).count_batches(epochs)
        again, rows = stream(given), []
        for _ in range(count):
            rows.append(again.next_batch().num_tokens)
        assert sum(rows) >= epochs * again.num_tokens > sum(rows[:-1])


def test_a_split_is_one_of_the_samples() -> None:
    given = samples([5] * 200)
    for number, each in enumerate(given):
        each[1] = number
    train, held_out = SampleSet([given[:50], given[50:]]).split(0.2)
    sides = [{int(side[index][1]) for index in range(len(side))} for side in (train, held_out)]
    assert sides[0] | sides[1] == set(range(200)) and not sides[0] & sides[1]
    assert 20 <= len(sides[1]) <= 60
    assert train.num_rows == 4 * len(train)
    assert len(SampleSet([given[:1]]).split(0.5)[0]) == 1


def test_a_shard_holds_its_samples(tmp_path: Path) -> None:
    given = samples([5, 2, 9])
    facts = write_shard(tmp_path / "a.shard", given, {"too long": ["f:3"]})
    shard = DataShard(tmp_path / "a.shard")
    assert shard.facts == facts and dict(facts.left_out) == {"too long": ["f:3"]}
    assert [each.tolist() for each in (shard[0], shard[1], shard[2])] == [each.tolist() for each in given]
    assert facts.num_learned == sum(int((each >= 0).sum()) for each in given)
    empty = write_shard(tmp_path / "b.shard", [], {})
    assert len(DataShard(tmp_path / "b.shard")) == empty.num_samples == 0


def test_every_damaged_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.shard"
    write_shard(path, samples([5, 2]), {})
    sound = path.read_bytes()
    for place in range(0, len(sound), 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(CorruptCheckpoint, match=r"a\.shard: content differs"):
            DataShard(path)
    for length in (0, 1, 15, 16, len(sound) - 1):
        path.write_bytes(sound[:length])
        with pytest.raises(CorruptCheckpoint, match=r"a\.shard"):
            DataShard(path)
    with pytest.raises(CorruptCheckpoint, match="No such file"):
        DataShard(tmp_path / "none.shard")
