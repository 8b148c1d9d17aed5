"""What fits: weights, a folder on the disk, and sequences beside the weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from qnext.config import preset
from qnext.errors import DoesNotFit, UsageError
from qnext.planning import kv_bytes_per_token, machine, state_bytes_per_sequence
from qnext.planning.plan import Surroundings, WantedSizes, check_disk, check_weights, estimate, plan_engine

CONFIG = preset("nano-5m")


def test_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 1000)
    check_weights("folder", 1000)
    with pytest.raises(DoesNotFit, match=r"^folder: weights of 1001 B, but 1000 B of memory are free; buy 1000$"):
        check_weights("folder", 1001, hint=lambda free: f"; buy {free}")


def test_a_folder_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    check_disk(tmp_path / "a" / "b", 1 << 30)
    with pytest.raises(DoesNotFit, match=r"needs 2\.0 GiB, but 1\.0 GiB of .* are free"):
        check_disk(tmp_path / "a" / "b", 2 << 30)


def test_sequences_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are left when weights and steps have their bytes, each with its state and the keys of all layers."""
    per_sequence = state_bytes_per_sequence(CONFIG).total + 64 * kv_bytes_per_token(CONFIG, with_mtp=True)
    monkeypatch.setattr(machine, "available_bytes", lambda: 0)
    nothing = estimate(CONFIG, 10, lengths=(64,), num_threads=1)
    assert not nothing.holds_weights and nothing.fits == {64: 0} and nothing.longest == 0
    monkeypatch.setattr(machine, "available_bytes", lambda: 10 + nothing.workspace_bytes + 3 * per_sequence)
    found = estimate(CONFIG, 10, lengths=(64,), num_threads=1)
    assert found.holds_weights and found.fits == {64: 3}
    assert found.longest > 64


WANTED = WantedSizes(
    max_num_seqs=4,
    max_num_batched_tokens=None,
    max_model_len=1024,
    num_blocks=None,
    kv_budget_bytes=None,
    kv_dtype="float32",
    state_dtype="float32",
    has_prefix_cache=True,
    num_checkpoints=None,
    max_draft_tokens=0,
    has_drafter=False,
)
AROUND = Surroundings(
    available_bytes=1 << 40,
    num_threads=1,
    workspace_factor=1,
    copies_context=False,
    recorded=(),
    block_size=16,
    chunk_size=64,
    num_sources=64,
    num_draft_pages=32,
)


def test_sizes_shrink_in_their_order() -> None:
    """First the step and the states of cached prefixes, then the blocks, each no more than it must."""
    plans = []
    available = 1 << 30
    while available > 1 << 20:
        try:
            plans.append(plan_engine(CONFIG, WANTED, AROUND._replace(available_bytes=available)))
        except DoesNotFit as error:
            assert "lower max_num_seqs (now 4)" in str(error)
            break
        available = available * 15 // 16
    else:
        pytest.fail("nothing is too small")
    first, last = plans[0], plans[-1]
    assert (first.num_blocks, first.num_slots, first.max_model_len) == (4 * 64, 12, 1024)
    assert (last.num_slots, last.max_num_batched_tokens) == (4, 3 + 64)
    assert last.num_blocks < first.num_blocks and last.max_model_len == min(1024, 16 * last.num_blocks)
    for before, after in pairwise(plans):
        assert before.max_num_batched_tokens >= after.max_num_batched_tokens and before.num_slots >= after.num_slots


def test_what_is_given_stays_or_is_refused() -> None:
    given = replace(WANTED, num_blocks=10, max_num_batched_tokens=100, num_checkpoints=1)
    sizes = plan_engine(CONFIG, given, AROUND)
    assert (sizes.num_blocks, sizes.max_num_batched_tokens, sizes.num_slots) == (10, 100, 5)
    assert sizes.max_model_len == 160, "a cache smaller than the context is the context"
    named = (
        r"lower max_num_seqs \(now 4\) or max_num_batched_tokens \(100\) or num_blocks \(10\) or num_checkpoints \(1\)"
    )
    with pytest.raises(DoesNotFit, match=named):
        plan_engine(CONFIG, given, AROUND._replace(available_bytes=1 << 20))
    with pytest.raises(UsageError, match="not both"):
        plan_engine(CONFIG, replace(given, kv_budget_bytes=1 << 20), AROUND)
    with pytest.raises(UsageError, match="at least one block"):
        plan_engine(CONFIG, replace(WANTED, kv_budget_bytes=1), AROUND)


def test_a_backend_takes_what_it_says() -> None:
    plain = plan_engine(CONFIG, WANTED, AROUND).workspace_bytes
    twice = plan_engine(CONFIG, WANTED, AROUND._replace(workspace_factor=2)).workspace_bytes
    copying = plan_engine(CONFIG, WANTED, AROUND._replace(copies_context=True)).workspace_bytes
    recording = plan_engine(CONFIG, WANTED, AROUND._replace(recorded=(4, 3))).workspace_bytes
    assert twice > 1.5 * plain and recording > plain
    assert copying - plain == 2 * 1024 * kv_bytes_per_token(CONFIG, dtype="float32")
