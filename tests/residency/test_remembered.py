"""A run begins with the residents of the last one."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from qnext import ops
from qnext.residency.remembered import FILE_NAME, recall, recalling, remember
from tests.residency.records import NUM_EXPERTS, make_layer, open_store, write_file

pytestmark = pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")


def residency(tmp_path: Path, slots: int) -> ops.Residency:
    made = [make_layer("int4", seed=seed) for seed in range(2)]
    return open_store(write_file(tmp_path / "records", [layer for layer, _ in made], made[0][1]), slots=slots).residency


def test_residents_come_back_with_their_loads(tmp_path: Path) -> None:
    first = residency(tmp_path, 9)
    assert not remember(first, tmp_path), "nobody is resident yet"
    for layer in range(2):
        first.experts_of(layer).use(list(range(layer, layer + 9)), list(range(1, 10)), num_tokens=9)
    assert remember(first, tmp_path)
    again = residency(tmp_path, 9)
    assert recall(again, tmp_path, seconds=60) == 18
    assert [again.residents(layer) for layer in range(2)] == [first.residents(layer) for layer in range(2)]
    smaller = residency(tmp_path, 4)
    assert recall(smaller, tmp_path, seconds=60) == 8
    assert smaller.residents(1) == first.residents(1)[:4], "the most wanted"
    assert recall(residency(tmp_path, 9), tmp_path, seconds=0) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        json.dumps({"version": 2, "layers": [[], []]}),
        json.dumps({"version": 1, "layers": [[[0, 5]]]}),
        json.dumps({"version": 1, "layers": [[[NUM_EXPERTS, 5]], []]}),
        json.dumps({"version": 1, "layers": [[[-1, 5]], []]}),
        json.dumps({"version": 1, "layers": [[[1, 1 << 80]], []]}),
        json.dumps({"version": 1, "layers": [["ab"], []]}),
        "[" * 100_000,
    ],
)
def test_what_is_no_memory_of_this_model_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    assert recall(residency(tmp_path, 3), tmp_path, seconds=60) == 0


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    first = residency(tmp_path, 3)
    first.experts_of(0).use([1], [1], num_tokens=1)
    assert not remember(first, tmp_path / "missing" / "folder")


def test_recall_works_beside_other_work_and_ends_with_it(tmp_path: Path) -> None:
    first = residency(tmp_path, 9)
    for layer in range(2):
        first.experts_of(layer).use(list(range(9)), [1] * 9, num_tokens=1)
    remember(first, tmp_path)
    again = residency(tmp_path, 9)
    with recalling(again, tmp_path):
        pass
    assert [again.residents(layer) for layer in range(2)] == [first.residents(layer) for layer in range(2)]
    given_up = residency(tmp_path, 9)
    is_over = threading.Event()
    is_over.set()
    assert recall(given_up, tmp_path, seconds=60, is_over=is_over) == 0
    with pytest.raises(KeyboardInterrupt), recalling(given_up, tmp_path, seconds=60):
        raise KeyboardInterrupt
