"""Buckets: never more than the limit and what flowed in, and whoever waits as long as told gets through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.server.access import rates as rates_module
from qnext.server.access.keys import Key
from qnext.server.access.rates import FailedLogins, KeyRates, Refusal


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_key(number: int = 1, **limits: Any) -> Key:
    return Key(f"{number:08x}", "somebody", "0" * 64, 1, **limits)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def bounded(times: Sequence[float], amounts: Sequence[float], limit: float, per_second: float) -> bool:
    """In every window from one event to another."""
    return all(
        sum(amounts[first : last + 1]) <= limit + (times[last] - times[first]) * per_second + 1e-3
        for first in range(len(times))
        for last in range(first, len(times))
    )


EVENTS = st.lists(
    st.tuples(st.floats(0, 30, allow_nan=False), st.integers(0, 40), st.integers(0, 30), st.booleans()), max_size=60
)


@settings(deadline=None)
@given(EVENTS, st.integers(1, 20), st.integers(1, 60), st.integers(1, 3))
def test_no_window_has_more_than_limit_and_inflow(
    events: list[tuple[float, int, int, bool]], rpm: int, tpm: int, parallel: int
) -> None:
    clock = Clock()
    key, rates = make_key(requests_per_minute=rpm, tokens_per_minute=tpm, max_parallel=parallel), KeyRates(clock=clock)
    running: list[int] = []
    times, tokens = [], []
    for seconds, num_tokens, num_answer, ends in events:
        clock.now += seconds
        if ends and running:
            charged = running.pop()
            rates.finish(key, charged, charged + num_answer)
        elif (refusal := rates.check(key, num_tokens)) is None:
            running.append(num_tokens)
            times.append(clock.now)
            tokens.append(num_tokens)
        elif refusal.retry_after is not None and refusal.reason != "parallel":
            clock.now += refusal.retry_after
            again = rates.check(key, num_tokens)
            if again is None:
                running.append(num_tokens)
                times.append(clock.now)
                tokens.append(num_tokens)
            else:  # one limit was waited for, the other one is left
                assert again.reason == "tokens" != refusal.reason
        assert len(running) <= parallel
        left = int(rates.headers(key)["x-ratelimit-remaining-requests"])
        assert 0 <= left <= rpm
    assert bounded(times, [1] * len(times), rpm, rpm / 60)
    assert bounded(times, tokens, tpm, tpm / 60)


def test_requests_of_a_minute(clock: Clock) -> None:
    key, rates = make_key(requests_per_minute=6), KeyRates(clock=clock)
    assert [rates.check(key, 1) for _ in range(6)] == [None] * 6
    clock.now += 2.5
    refusal = rates.check(key, 1)
    assert refusal is not None and refusal.reason == "requests"
    assert refusal.retry_after == pytest.approx(7.5)
    assert refusal.headers == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "57.500s",
        "Retry-After": "8",
    }
    clock.now += 7.4
    assert rates.check(key, 1) is not None
    clock.now += 0.1
    assert rates.check(key, 1) is None
    clock.now += 1e6
    assert [rates.check(key, 1) is None for _ in range(7)] == [True] * 6 + [False]  # it fills no further


def test_tokens_are_corrected_at_the_end(clock: Clock) -> None:
    key, rates = make_key(tokens_per_minute=600), KeyRates(clock=clock)

    def remaining() -> int:
        return int(rates.headers(key)["x-ratelimit-remaining-tokens"])

    assert rates.check(key, 100) is None and remaining() == 500
    rates.finish(key, 100, 350)
    assert remaining() == 250
    assert rates.check(key, 200) is None and remaining() == 50
    rates.finish(key, 200, 0)  # it failed before anything was computed
    assert remaining() == 250
    assert rates.check(key, 250) is None
    rates.finish(key, 250, 850)
    assert remaining() == 0
    refusal = rates.check(key, 1)
    assert refusal is not None and refusal.reason == "tokens"
    assert refusal.retry_after == pytest.approx(60.1)  # 600 of debt, and one
    clock.now += refusal.retry_after or 0
    assert rates.check(key, 1) is None
    clock.now += 1e6
    rates.finish(key, 1, 0)
    assert remaining() == 600  # never more than the limit


def test_nothing_is_charged_for_a_refusal(clock: Clock) -> None:
    key = make_key(requests_per_minute=3, tokens_per_minute=10, max_parallel=2)
    rates = KeyRates(clock=clock)
    too_large = rates.check(key, 11)
    assert too_large is not None and (too_large.reason, too_large.retry_after) == ("too_large", None)
    assert "Retry-After" not in too_large.headers
    assert rates.check(key, 4) is None and rates.check(key, 4) is None
    before = rates.headers(key)
    for _ in range(5):
        refusal = rates.check(key, 1)
        assert refusal is not None and refusal.reason == "parallel"
    assert rates.headers(key) == before
    rates.finish(key, 4, 4)
    refusal = rates.check(key, 4)
    assert refusal is not None and refusal.reason == "tokens"
    assert rates.check(key, 2) is None


def test_keys_do_not_touch_each_other(clock: Clock) -> None:
    rates = KeyRates(clock=clock)
    first, second = make_key(1, requests_per_minute=1), make_key(2, requests_per_minute=1)
    assert rates.check(first, 1) is None and rates.check(first, 1) is not None
    assert rates.check(second, 1) is None


def test_a_key_without_limits_is_not_tracked(clock: Clock) -> None:
    rates = KeyRates(clock=clock, max_tracked=1)
    for number in range(100):
        assert rates.check(make_key(number), 10**9) is None
        assert rates.headers(make_key(number)) == {}
        rates.finish(make_key(number), 10**9, 1)
    assert rates.check(make_key(requests_per_minute=1), 1) is None


def test_headers_name_only_the_limits_there_are(clock: Clock) -> None:
    rates = KeyRates(clock=clock)
    assert rates.headers(make_key(1, tokens_per_minute=50)) == {
        "x-ratelimit-limit-tokens": "50",
        "x-ratelimit-remaining-tokens": "50",
        "x-ratelimit-reset-tokens": "0.000s",
    }
    assert rates.headers(make_key(2, max_parallel=1)) == {}


def test_limits_that_change_while_a_key_is_in_use(clock: Clock) -> None:
    rates = KeyRates(clock=clock)
    for _ in range(5):
        assert rates.check(make_key(requests_per_minute=10), 1) is None
    remaining = "x-ratelimit-remaining-requests"
    assert rates.headers(make_key(requests_per_minute=100))[remaining] == "5"  # no new burst
    clock.now += 6
    assert rates.headers(make_key(requests_per_minute=100))[remaining] == "15"
    assert rates.headers(make_key(requests_per_minute=3))[remaining] == "3"
    assert rates.check(make_key(max_parallel=9), 1) is None
    assert rates.headers(make_key(requests_per_minute=8))[remaining] == "8"


def test_the_table_is_bounded_and_forgets_only_the_idle(clock: Clock) -> None:
    rates = KeyRates(clock=clock, max_tracked=3)
    keys = [make_key(number, requests_per_minute=1, max_parallel=1) for number in range(5)]
    for key in keys[:3]:
        assert rates.check(key, 1) is None
    refusal = rates.check(keys[3], 1)
    assert refusal is not None and (refusal.reason, refusal.headers) == ("table", {"Retry-After": "1"})
    clock.now += 61  # the buckets are full again, but all have a request
    assert rates.check(keys[3], 1) is not None
    rates.finish(keys[0], 1, 1)
    clock.now += 1
    assert rates.check(keys[3], 1) is None
    busy = rates.check(keys[1], 1)
    assert busy is not None and busy.reason == "parallel"


def test_bad_keys_are_braked(clock: Clock) -> None:
    logins = FailedLogins(clock=clock)
    assert [logins.fail("10.0.0.1") for _ in range(20)] == [None] * 20
    refusal = logins.fail("10.0.0.1")
    assert isinstance(refusal, Refusal) and refusal.reason == "bad_keys" and refusal.headers == {"Retry-After": "1"}
    assert refusal.retry_after == pytest.approx(0.1)
    assert logins.fail("10.0.0.1") is not None
    assert logins.fail("10.0.0.2") is None
    num_allowed = 0
    for _ in range(10_000):  # for ten seconds
        clock.now += 0.001
        num_allowed += logins.fail("10.0.0.1") is None
    assert 99 <= num_allowed <= 100
    clock.now += 2
    assert logins.fail("10.0.0.1") is None
    clock.now += 1e6  # a long peace earns no larger burst
    assert sum(logins.fail("10.0.0.1") is None for _ in range(100)) == 20


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2, allow_nan=False), st.sampled_from(["a", "b", "::1"])), max_size=80))
def test_no_address_fails_faster_than_that(events: list[tuple[float, str]]) -> None:
    clock = Clock()
    logins = FailedLogins(per_second=3.0, burst=4, clock=clock)
    times: dict[str, list[float]] = {}
    for seconds, client in events:
        clock.now += seconds
        if logins.fail(client) is None:
            times.setdefault(client, []).append(clock.now)
    for found in times.values():
        assert bounded(found, [1] * len(found), 4, 3.0)


def test_networks_of_one_customer_are_one(clock: Clock) -> None:
    logins = FailedLogins(burst=2, clock=clock)
    assert logins.fail("2001:db8:1:2::1") is None and logins.fail("2001:db8:1:2:ffff::2") is None
    assert logins.fail("2001:db8:1:2:3:4:5:6") is not None
    assert logins.fail("2001:db8:1:3::1") is None
    assert logins.fail("::ffff:10.0.0.1") is None and logins.fail("10.0.0.1") is None
    assert logins.fail("10.0.0.1") is not None
    assert logins.fail("no address" * 1000) is None


def test_a_flood_of_addresses_takes_no_memory_and_is_braked(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    logins = FailedLogins(clock=clock, max_tracked=50)
    is_idle, calls = rates_module._Bucket.is_idle, []
    monkeypatch.setattr(rates_module._Bucket, "is_idle", lambda self, now: calls.append(1) or is_idle(self, now))
    num_allowed = sum(logins.fail(f"10.0.{number // 256}.{number % 256}") is None for number in range(5000))
    assert num_allowed == 50 + 20  # one for each that is told apart, and one burst for all others
    assert len(logins._table._states) == 50
    assert len(calls) == 50  # the table is looked through once in that moment, not for each of them
    clock.now += 60
    assert logins.fail("10.9.9.9") is None and len(logins._table._states) == 1


def test_retry_after_is_whole_and_enough(clock: Clock) -> None:
    key, rates = make_key(requests_per_minute=7), KeyRates(clock=clock)
    while (refusal := rates.check(key, 1)) is None:
        clock.now += 0.37
    assert int(refusal.headers["Retry-After"]) == math.ceil(refusal.retry_after or 0) >= 1
    clock.now += int(refusal.headers["Retry-After"])
    assert rates.check(key, 1) is None
