"""Who is lost, and what the others say of it: ranks as threads on one store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import torch.distributed as dist

from qnext.errors import CorruptCheckpoint, DoesNotFit, LostRank
from qnext.parallel.watch import RankWatch, Vigilance

IN_A_LIBRARY = Vigilance(ends_process=False)


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def pair(store: dist.Store) -> Iterator[list[RankWatch]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(RankWatch(store, rank, 2, IN_A_LIBRARY))) for rank in range(2)]


def test_ranks_meet(pair: list[RankWatch]) -> None:
    came: list[int] = []
    late = threading.Timer(0.3, lambda: (came.append(1), pair[1].meet("here")))  # type: ignore[func-returns-value]
    late.start()
    assert pair[0].meet("here")
    assert came == [1]
    late.join()
    assert not pair[0].meet("where nobody else comes", seconds=0.05)


def test_a_rank_that_fails_is_told_with_its_own_words_and_code(pair: list[RankWatch]) -> None:
    pair[1].tell(CorruptCheckpoint("model.safetensors: tensor x is damaged"))
    pair[1].tell(DoesNotFit("a second word"))
    with pytest.raises(LostRank, match=r"^rank 1: model.safetensors: tensor x is damaged$") as raised:
        pair[0].meet("never")
    assert raised.value.exit_code == CorruptCheckpoint.exit_code and raised.value.ends_engine
    assert pair[1].told() is None, "its own failure is no loss of another"


def test_an_error_that_nobody_foresaw_is_told_by_its_kind(pair: list[RankWatch]) -> None:
    pair[1].tell(RuntimeError("no memory"))
    lost = pair[0].verdict()
    assert lost is not None and (str(lost), lost.exit_code) == ("rank 1: RuntimeError: no memory", LostRank.exit_code)


def test_what_follows_from_a_loss_is_no_failure(pair: list[RankWatch]) -> None:
    pair[1].tell(LostRank("rank 0 was lost"))
    assert pair[0].told() is None


@pytest.mark.parametrize(("code", "how"), [(-9, "signal 9 ended it"), (3, "it ended with 3")])
def test_a_process_that_ended(store: dist.Store, code: int, how: str) -> None:
    called = threading.Event()
    watch = RankWatch(store, 0, 2, IN_A_LIBRARY._replace(exits={1: lambda: code}, on_lost=called.set))
    with closing(watch):
        assert called.wait(5)
        assert str(watch.verdict()) == f"rank 1 was lost: {how}"


def test_a_rank_that_shows_no_life(store: dist.Store) -> None:
    """After a call has failed, a rank that is silent for three seconds is lost, however patient one is."""
    RankWatch(store, 1, 2, IN_A_LIBRARY).close()
    with closing(RankWatch(store, 0, 2, IN_A_LIBRARY)) as watch:
        lost = watch.verdict()
    assert lost is not None and "rank 1 was lost: it has shown no life" in str(lost)


def test_ranks_that_live_are_not_lost(pair: list[RankWatch]) -> None:
    assert pair[0].verdict() is None
