"""Index maps of the packed layout against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.ops import Packing

lengths_lists = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(0, 4), st.integers(1, 5))
def test_maps(lengths: list[int], extra: int, chunk_size: int) -> None:
    packing = Packing(lengths)
    places = [(n, t) for n, length in enumerate(lengths) for t in range(length)]
    assert packing.num_tokens == len(places)
    assert packing.sequence_ids_T.tolist() == [n for n, _ in places]
    assert packing.offsets_T.tolist() == [t for _, t in places]
    assert packing.cu_seqlens.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert packing.last_tokens_N.tolist() == [sum(lengths[: n + 1]) - 1 for n in range(len(lengths))]
    assert packing.is_uniform == (len(set(lengths)) == 1)

    rows_T, history = packing.extended_rows(extra)
    starts = [sum(lengths[:n]) + n * extra for n in range(len(lengths))]
    assert rows_T.tolist() == [starts[n] + extra + t for n, t in places]
    assert history.tolist() == [[start + i for i in range(extra)] for start in starts]

    layout = packing.chunk_layout(chunk_size)
    order = layout.order.tolist()
    assert sorted(order) == list(range(len(lengths)))
    counts = [-(-length // chunk_size) for length in lengths]
    assert [counts[n] for n in order] == sorted(counts, reverse=True)
    assert layout.num_chunks == sum(counts)
    for (n, t), row in zip(places, layout.rows.tolist(), strict=True):
        chunk = layout.starts[t // chunk_size] + order.index(n)
        assert row == chunk * chunk_size + t % chunk_size


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_groups_of_similar_lengths(lengths: list[int]) -> None:
    packing = Packing(lengths)
    starts = packing.cu_seqlens.tolist()
    rows: list[int] = []
    for group in packing.padded_groups:
        for row in group.tolist():
            n = starts.index(row[0])
            assert row == [starts[n] + min(t, lengths[n] - 1) for t in range(len(row))]
            assert lengths[n] <= len(row) < 2 * max(lengths[n], 31)
            rows += row
    assert [rows[place] for place in packing.grouped_rows_T.tolist()] == list(range(sum(lengths)))


def test_an_empty_sequence_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Packing([3, 0])


def test_the_device_is_kept() -> None:
    assert Packing([2], device="meta").cu_seqlens.device == torch.device("meta")
