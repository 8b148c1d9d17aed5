"""Tensors worked on several at once: their order, the memory that they take, what goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import reading
from qnext.checkpoint.files import ShardWriter, TensorFiles, TensorSpec
from qnext.checkpoint.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3, "the threads of the caller are others than before"
    torch.set_num_threads(count)


def test_results_come_in_order_and_work_side_by_side() -> None:
    together = threading.Barrier(3, timeout=60)

    def work(number: int) -> tuple[int, int]:
        together.wait()  # passes only where three are worked on at once
        time.sleep(0.001 * (number % 3))
        return number, torch.get_num_threads()

    assert list(side_by_side(work, ((i, 1) for i in range(30)))) == [(i, 1) for i in range(30)]


def test_no_more_than_the_bound_is_under_way() -> None:
    asked, given = [0], [0]

    def pieces() -> Iterator[tuple[int, int]]:
        for i in range(40):
            asked[0] += 1
            assert asked[0] - given[0] <= 6  # five of 10 bytes, and the one that is just asked for
            yield i, 10

    for each in side_by_side(lambda i: i, pieces(), bytes_ahead=50):
        assert each == given[0]
        given[0] += 1
    assert given == [40]


def test_a_large_piece_is_worked_on_by_all_threads_together() -> None:
    where = list(side_by_side(lambda i: (i, threading.get_ident()), [(0, 10), (1, 99), (2, 10)], bytes_ahead=50))
    assert [i for i, _ in where] == [0, 1, 2]
    assert [ident == threading.get_ident() for _, ident in where] == [False, True, False]


def test_what_goes_wrong_is_raised_and_the_rest_is_not_begun() -> None:
    begun, threads = [], set()

    def work(number: int) -> int:
        begun.append(number)
        threads.add(threading.current_thread())
        if number == 2:
            raise OSError("broken")
        return number

    with (
        pytest.raises(OSError, match="broken"),
        closing(side_by_side(work, ((i, 20) for i in range(1000)), bytes_ahead=100)) as made,
    ):
        for _ in made:
            pass
    assert len(begun) < 20
    assert not any(thread.is_alive() for thread in threads)


def test_tensors_of_many_files_are_read_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files than are kept open: one thread closes what another reads."""
    monkeypatch.setattr(reading, "_MOST_OPEN", 2)
    tensors = {f"t{i}": torch.arange(i, i + 1000) for i in range(40)}
    plan = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = ShardWriter(tmp_path, plan, max_shard_bytes=1)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    with TensorFiles(tmp_path) as files:

        def is_right(name: str) -> bool:
            pieces = torch.cat([piece.clone() for piece in files.pieces(name)])
            return torch.equal(files.read(name), tensors[name]) and torch.equal(pieces, tensors[name])

        assert all(side_by_side(is_right, [(name, 1) for name in tensors] * 20))
