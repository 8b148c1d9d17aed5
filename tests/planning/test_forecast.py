"""What a model takes and gives on a machine, before it is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from qnext.config import preset
from qnext.planning import kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.expert_memory import ExpertSizes, engine_reserve, plan_expert_memory
from qnext.planning.expert_speed import TRAFFIC, MachineRates
from qnext.planning.forecast import Circumstances, Forecast, forecast, with_more_memory
from qnext.planning.step_load import StoredSizes

GIB = 1 << 30
CONFIG = preset("80b-a3b")
EXPERTS = ExpertSizes(num_layers=48, num_experts=512, record_bytes=1_769_472, other_bytes=3 * GIB)
SIZES = StoredSizes(1_400_000_000, EXPERTS, can_stream=True)
RATES = MachineRates(memory=30e9, disk=1.5e9, arithmetic=2e12)


def on(free: float, *, context: int = 4096, batch: int = 1) -> Circumstances:
    return Circumstances(int(free * GIB), 2, RATES, context, batch)


def test_what_fits_stays_and_reads_nothing() -> None:
    found = forecast(CONFIG, SIZES, on(60))
    assert (found.placement, found.share, found.disk_bytes, found.problem) == ("resident", 1.0, 0, "")
    assert found.expert_bytes == EXPERTS.all_bytes
    assert {speed.hit_rate for speed in found.traffic.values()} == {1.0}
    assert {speed.ceiling for speed in found.traffic.values()} == {None}
    assert len({speed.decode for speed in found.traffic.values()}) == 1


def test_what_does_not_fit_is_streamed_as_loading_does_it() -> None:
    found = forecast(CONFIG, SIZES, on(22))
    chosen = plan_expert_memory(CONFIG, EXPERTS, free_bytes=22 * GIB, wanted_bytes=None, num_threads=2)
    assert chosen is not None and found.placement == "streamed" and not found.advice
    assert found.expert_bytes == chosen.num_bytes
    assert found.share == pytest.approx(sum(chosen.slots) / (48 * 512))
    assert found.disk_bytes == pytest.approx((1 - found.share) * EXPERTS.all_bytes)
    assert set(found.traffic) == set(TRAFFIC) and set(found.prefill) == {512, 4096}
    for speed in found.traffic.values():
        assert speed.ceiling is not None and speed.decode < speed.ceiling
    uniform, diverse, service = (found.traffic[name].decode for name in TRAFFIC)
    assert uniform < diverse < service
    assert found.used_bytes <= 22 * GIB


def test_what_sequences_take_is_counted() -> None:
    found = forecast(CONFIG, SIZES, on(22, context=8192, batch=3))
    assert found.kv_bytes == 3 * 8192 * kv_bytes_per_token(CONFIG, with_mtp=True)
    assert found.state_bytes == 3 * state_bytes_per_sequence(CONFIG).total


def test_long_contexts_leave_less_to_experts() -> None:
    """More than loading leaves to an engine by itself: the forecast says which flag makes room."""
    short, long = forecast(CONFIG, SIZES, on(22)), forecast(CONFIG, SIZES, on(22, context=262_144))
    assert long.share < short.share
    megabytes = int(long.advice.removeprefix("`--expert-memory ").partition("M")[0])
    reserve = engine_reserve(CONFIG, num_threads=2, num_sequences=1, num_tokens=262_144)
    assert megabytes == (19 * GIB - reserve) >> 20
    assert "1 x 262,144 tokens" in long.advice
    assert long.expert_bytes == pytest.approx(megabytes << 20, rel=0.001)


def test_memory_that_is_given_to_experts_is_theirs() -> None:
    found = forecast(CONFIG, SIZES, on(22)._replace(expert_bytes=8 * GIB))
    assert found.expert_bytes == pytest.approx(8 * GIB, rel=0.001) and not found.advice
    assert forecast(CONFIG, SIZES, on(60)._replace(expert_bytes=8 * GIB)).share == found.share
    assert forecast(CONFIG, SIZES, on(22)._replace(expert_bytes=20 * GIB)).placement == "too large"


def test_too_large() -> None:
    found = forecast(CONFIG, SIZES, on(5))
    assert found.placement == "too large" and not found.traffic and not found.prefill
    assert "experts on disk need 162.0 MiB of memory at least" in found.problem


def test_experts_that_cannot_be_read_one_by_one_must_all_fit() -> None:
    plain = SIZES._replace(can_stream=False)
    assert forecast(CONFIG, plain, on(60)).placement == "resident"
    found = forecast(CONFIG, plain, on(22))
    assert found.placement == "too large"
    share = forecast(CONFIG, SIZES, on(22)).share
    assert found.problem.startswith("weights of 43.5 GiB and ")
    assert f"22.0 GiB of memory are free; with its experts in records, which `--records` writes, {share:.0%}" in (
        found.problem
    )
    assert "records" not in forecast(CONFIG, plain, on(5)).problem


def test_a_model_without_experts() -> None:
    config = preset("qwen3-32b")
    sizes = StoredSizes(17 * GIB, ExpertSizes(0, 0, 0, 18 * GIB), can_stream=False)
    found = forecast(config, sizes, on(22, context=256))
    assert found.placement == "resident" and found.traffic["uniform"].ceiling is None
    assert forecast(config, sizes, on(18, context=256)).placement == "too large"


def test_prompts_are_as_long_as_the_context_allows() -> None:
    config = preset("nano-5m").with_(max_position_embeddings=256)
    sizes = StoredSizes(1_000_000, ExpertSizes(4, 64, 8192, 2_000_000), can_stream=True)
    assert set(forecast(config, sizes, on(8, context=256)).prefill) == {255}


def test_more_memory_brings_more() -> None:
    found = with_more_memory(CONFIG, SIZES, on(22), [8 * GIB, 16 * GIB, 32 * GIB, 64 * GIB])
    assert list(found) == [8 * GIB, 16 * GIB, 32 * GIB]  # with which everything is in memory
    shares = [each.share for each in found.values()]
    assert shares == sorted(shares) and shares[-1] == 1.0
    plain: list[dict[str, Any]] = [asdict(each) for each in found.values()]
    assert plain[0]["placement"] == "streamed"
    assert isinstance(found[8 * GIB], Forecast)
