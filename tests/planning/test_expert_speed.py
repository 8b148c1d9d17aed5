"""Predicted speed of a model whose experts are partly on disk."""

from __future__ import annotations

import pytest

from qnext.planning.expert_memory import ExpertSizes
from qnext.planning.expert_speed import (
    ARRIVAL_PASSES,
    DECODE_SHARE,
    GUESSES_OF_LAYER,
    PROMPT_SHARE,
    TRAFFIC,
    MachineRates,
    StepWork,
    decode_time,
    expected_hit_rate,
    missed_bytes,
    prefill_time,
)
from qnext.residency.policy import ResidentSet
from qnext.residency.traces import RoutingTrace

EXPERTS = ExpertSizes(num_layers=48, num_experts=512, record_bytes=1_769_472, other_bytes=3 << 30)
WORK = StepWork(
    dense_bytes=1_400_000_000, sequence_bytes=150_000_000, operations=6_500_000_000, used_experts=10, experts=EXPERTS
)
RATES = MachineRates(memory=40e9, disk=1.5e9, arithmetic=2e12)


def simulated(traffic: str, share: float, layer: int, *, num_experts: int, used: int) -> float:
    """Hit rate of the policy itself, of 400 tokens after 400."""
    residents = ResidentSet(num_experts, round(share * num_experts), half_life=64)
    rows = RoutingTrace(traffic, num_experts=num_experts, top_k=used, layer=layer, seed=5).take(800).tolist()
    return sum([residents.use(row, [1] * used, num_tokens=1) for row in rows][400:]) / (400 * used)


@pytest.mark.parametrize(("traffic", "share"), [("diverse", 0.2), ("service", 0.2)])
def test_the_table_is_what_the_policy_does(traffic: str, share: float) -> None:
    flat, later = (simulated(traffic, share, layer, num_experts=512, used=10) for layer in (0, 9))
    expected = expected_hit_rate(traffic, share, used_share=10 / 512)
    assert expected == pytest.approx((3 * flat + 45 * later) / 48, abs=0.03)


@pytest.mark.parametrize("traffic", ["diverse", "service"])
def test_other_numbers_of_experts(traffic: str) -> None:
    """128 experts of which 8 are used hit much less than 512 and 10 at the same share."""
    expected = expected_hit_rate(traffic, 0.2, used_share=8 / 128)
    assert expected == pytest.approx(simulated(traffic, 0.2, 9, num_experts=128, used=8), abs=0.05)
    assert expected < expected_hit_rate(traffic, 0.2, used_share=10 / 512) - 0.03


@pytest.mark.parametrize("traffic", TRAFFIC)
def test_hit_rates_rise_from_nothing_to_all(traffic: str) -> None:
    rates = [expected_hit_rate(traffic, share / 200, used_share=10 / 512) for share in range(201)]
    assert rates == sorted(rates) and (rates[0], rates[-1]) == (0.0, 1.0)
    assert all(rate >= share / 200 - 1e-9 for share, rate in enumerate(rates))


def test_decoding_without_misses_is_bound_by_memory() -> None:
    read = WORK.dense_bytes + WORK.sequence_bytes + 48 * 10 * EXPERTS.record_bytes
    assert decode_time(WORK, RATES, 1.0).rate == pytest.approx(DECODE_SHARE * RATES.memory / read)
    assert decode_time(WORK, RATES._replace(disk=1.0), 1.0).rate == decode_time(WORK, RATES, 1.0).rate


def test_decoding_with_misses_stays_below_the_ceiling_of_the_disk() -> None:
    speeds = []
    for hit_rate in (0.0, 0.37, 0.65, 0.93):
        speeds.append(decode_time(WORK, RATES, hit_rate, right_guesses=0.0).rate)
        ceiling = RATES.disk / missed_bytes(WORK, hit_rate)
        assert speeds[-1] < ceiling
        fast = RATES._replace(memory=1e15)
        assert decode_time(WORK, fast, hit_rate, right_guesses=0.0).rate == pytest.approx(ceiling, rel=0.001)
    assert speeds == sorted(speeds)
    assert missed_bytes(WORK, 0.0) == 48 * 10 * EXPERTS.record_bytes


def test_a_single_read_is_not_hidden_by_what_its_layer_computes() -> None:
    """One layer, one expert: half of the tokens read it, then compute it; the others compute it at once."""
    work = StepWork(0, 0, 0, 1, ExpertSizes(1, 8, 1_000_000, 0))
    rates = MachineRates(memory=1e9 / DECODE_SHARE, disk=1e8, arithmetic=1e9)
    found = decode_time(work, rates, 0.5, right_guesses=0.0)
    assert found.seconds == pytest.approx(0.5 * 0.001 + 0.5 * 0.011)
    assert found.read == pytest.approx(0.5 * 0.01)
    assert found.arithmetic == pytest.approx(0.001 * (1 + 0.5 * ARRIVAL_PASSES))


def test_right_guesses_are_read_while_every_token_s_part_is_computed() -> None:
    """Ten layers that miss three experts each; a layer computes for as long as two reads take."""
    experts = ExpertSizes(10, 64, 1_000_000, 0)
    rates = MachineRates(memory=1e12 / DECODE_SHARE, disk=1e9, arithmetic=1e15)  # a read takes a millisecond
    work = StepWork(int(10 * GUESSES_OF_LAYER * 1e9), 0, 0, 3, experts)
    without = decode_time(work, rates, 0.0, right_guesses=0.0)
    assert without.seconds == pytest.approx(10 * (0.002 + 0.003 + 1e-6), rel=0.001)
    right = decode_time(work, rates, 0.0, right_guesses=1.0)
    assert right.seconds == pytest.approx(10 * (0.002 + 0.001 + 1e-6), rel=0.001)
    assert right.read == pytest.approx(without.read) and right.overlapped > without.overlapped
    wrong = decode_time(work, rates, 0.0, right_guesses=1e-9)
    assert wrong.seconds == pytest.approx(without.seconds, rel=0.001), "they hinder nobody"
    assert wrong.read == pytest.approx(10 * 0.005)
    hurried = decode_time(work._replace(dense_bytes=0), rates, 0.0, right_guesses=1e-9)
    assert hurried.seconds == pytest.approx(10 * (0.002 + 0.003 + 1e-6), rel=0.001), "nothing to hide behind"


def test_what_a_token_takes_adds_up() -> None:
    for hit_rate in (0.0, 0.4, 1.0):
        for guesses in (0.0, 0.9):
            found = decode_time(WORK, RATES, hit_rate, batch=3, right_guesses=guesses)
            assert found.seconds == pytest.approx(found.arithmetic + found.read - found.overlapped)
            assert 0 <= found.overlapped <= min(found.arithmetic, found.read) + 1e-12
            assert found.rate == pytest.approx(1 / found.seconds)


def test_sequences_share_what_they_read() -> None:
    """Two tokens use nearly twice the experts of one, sixty-four far fewer than that."""
    one, two, many = (decode_time(WORK, RATES, 0.37, batch=batch, right_guesses=0.0).rate for batch in (1, 2, 64))
    assert one < two < 1.3 * one
    assert many > 1.8 * one


def test_a_prompt_reads_what_is_missing_once_for_each_chunk() -> None:
    on_disk = 0.63 * EXPERTS.all_bytes
    slow = RATES._replace(disk=1e9, arithmetic=1e16, memory=1e16)
    for num_tokens, passes in ((4096, 1), (8192, 1), (16_384, 2)):
        speed = prefill_time(WORK, slow, 0.37, num_tokens=num_tokens, chunk=8192).rate
        assert speed == pytest.approx(num_tokens / (passes * on_disk / 1e9), rel=0.001)
    short = prefill_time(WORK, slow, 0.37, num_tokens=16, chunk=8192).rate
    assert short > 1.5 * 16 / (on_disk / 1e9)  # touches less than half of the experts


def test_a_long_prompt_is_bound_by_arithmetic() -> None:
    fast = RATES._replace(disk=1e15)
    speed = prefill_time(WORK, fast, 0.37, num_tokens=8192, chunk=8192).rate
    assert speed == pytest.approx(PROMPT_SHARE * RATES.arithmetic / WORK.operations, rel=0.01)
    streamed = prefill_time(WORK, RATES, 0.37, num_tokens=8192, chunk=8192).rate
    assert 0.9 * speed < streamed < speed
