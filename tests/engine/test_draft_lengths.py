"""Draft lengths against simulated machines and texts: it gains where there is something to gain, and loses nowhere."""

from __future__ import annotations

import random

import pytest

from qnext.engine.policy.draft_lengths import Acceptance, CostEstimate, DraftCosts, DraftLengths, step_shapes

DEPTH = 3


class Machine:
    """Times of steps and passes in seconds, with noise, and requests whose drafts are right with a known chance."""

    def __init__(self, *, rates: list[float], cost_of_token: float, cost_of_pass: float, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.rates = rates
        self.cost_of_token, self.cost_of_pass = cost_of_token, cost_of_pass
        costs = DraftCosts(other_bytes=600, expert_bytes=3000, num_experts=64, top_k=8, mtp_bytes=100)
        step, draft_pass = step_shapes(costs)
        self.lengths = DraftLengths(DEPTH, step, draft_pass)
        self.draftings = [self.lengths.new_request() for _ in rates]
        self.seconds = 0.0
        self.num_tokens = 0
        self.num_drafted = 0

    def noise(self) -> float:
        slow = 3.0 if self.rng.random() < 0.01 else 1.0
        return slow * self.rng.uniform(0.95, 1.05)

    def step_seconds(self, num_tokens: int) -> float:
        num_sequences = len(self.rates)
        return 1e-3 * (1.0 + self.cost_of_token * (num_tokens - num_sequences)) * (1 + 0.1 * num_sequences)

    def step(self) -> None:
        wanted = self.lengths.choose(self.draftings, [DEPTH] * len(self.rates))
        idle = [n for n, length in enumerate(wanted) if not length]
        if idle and self.lengths.may_probe(self.draftings[idle[0]], num_left=0, num_sequences=len(wanted)):
            for _ in range(16):
                self.draftings[idle[0]].acceptance.observe(int(self.rng.random() < self.rates[idle[0]]), 1)
            seconds = 1e-3 * self.cost_of_pass * 4
            self.lengths.observe_probe(seconds)
            self.seconds += seconds
        for _ in range(max(wanted)):
            seconds = 1e-3 * self.cost_of_pass * self.noise()
            self.lengths.passes.observe(len(wanted), seconds)
            self.seconds += seconds
        size = len(wanted) + sum(wanted)
        seconds = self.step_seconds(size) * self.noise()
        self.lengths.observe_step(size, seconds)
        self.seconds += seconds
        for drafting, length, rate in zip(self.draftings, wanted, self.rates, strict=True):
            right = 0
            while right < length and self.rng.random() < rate:
                right += 1
            if length:
                drafting.acceptance.observe(right, length)
            self.num_tokens += 1 + right
            self.num_drafted += length

    def speed(self, num_steps: int) -> float:
        """Tokens a second, as a multiple of what they are without drafts."""
        self.seconds, self.num_tokens = 0.0, 0
        for _ in range(num_steps):
            self.step()
        plain = len(self.rates) / (self.step_seconds(len(self.rates)) * 1.02)
        return self.num_tokens / self.seconds / plain


@pytest.mark.parametrize("cost_of_token", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("num_sequences", [1, 4, 16])
def test_it_never_loses(cost_of_token: float, rate: float, num_sequences: int) -> None:
    machine = Machine(rates=[rate] * num_sequences, cost_of_token=cost_of_token, cost_of_pass=0.15)
    assert machine.speed(3000) > 0.98


def test_it_takes_all_that_is_to_be_had() -> None:
    """0.95 right at a tenth of the price: three drafts bring 3.71 tokens in 1.3 + 3 * 0.05 of the time."""
    machine = Machine(rates=[0.95], cost_of_token=0.1, cost_of_pass=0.05)
    assert machine.speed(3000) > 0.9 * 3.71 / 1.45


def test_the_one_request_that_gains_drafts() -> None:
    machine = Machine(rates=[0.95, 0.02, 0.02, 0.02], cost_of_token=0.1, cost_of_pass=0.05)
    machine.speed(2000)
    totals = [0] * 4
    for _ in range(500):
        machine.step()
        for n, length in enumerate(machine.lengths.choose(machine.draftings, [DEPTH] * 4)):
            totals[n] += length
    assert totals[0] > 2 * max(totals[1:])


def test_it_notices_when_drafts_become_worth_it() -> None:
    machine = Machine(rates=[0.0], cost_of_token=0.1, cost_of_pass=0.05)
    machine.speed(2000)
    machine.rates = [0.95]
    machine.speed(1500)
    assert machine.speed(500) > 1.8


def test_limits_are_kept() -> None:
    machine = Machine(rates=[1.0], cost_of_token=0.01, cost_of_pass=0.01)
    machine.speed(200)
    assert machine.lengths.choose(machine.draftings, [2]) == [2]
    assert machine.lengths.choose(machine.draftings, [0]) == [0]


def test_what_slows_everything_down_favours_no_size() -> None:
    """A machine that becomes half as fast while one size is in use says nothing about the others."""
    estimate = CostEstimate(lambda size: float(size))
    for _ in range(50):
        estimate.observe(1, 1.0)
        estimate.observe(4, 2.0)
    assert estimate.seconds(1) == pytest.approx(1.0, rel=0.05) and estimate.seconds(4) == pytest.approx(2.0, rel=0.05)
    for _ in range(200):
        estimate.observe(4, 4.0)
    assert estimate.seconds(4) == pytest.approx(4.0, rel=0.05)
    assert estimate.seconds(1) > 1.2


def test_a_first_time_that_took_long_does_not_end_a_size() -> None:
    estimate = CostEstimate(lambda size: 1.0 + 0.1 * size)
    for _ in range(20):
        estimate.observe(1, 1.1)
    estimate.observe(2, 30.0)
    assert estimate.seconds(2) < 1.2, "hardly seen, so not believed"
    for _ in range(6):
        estimate.observe(2, 1.3)
    assert estimate.seconds(2) == pytest.approx(1.3, rel=0.1)
    for _ in range(6):
        estimate.observe(3, 9.0)
    assert estimate.seconds(3) > 6, "seen often enough"


def test_drafting_that_began_slowly_is_tried_again() -> None:
    machine = Machine(rates=[0.95], cost_of_token=0.1, cost_of_pass=0.05)
    machine.lengths.passes.observe(1, 0.1)
    assert machine.speed(1000) > 2


def test_acceptance_counts_what_was_seen_only() -> None:
    acceptance = Acceptance(3, memory=1e9)
    for _ in range(1000):
        acceptance.observe(1, 3)  # the first right, the second wrong, of the third nothing is known
    assert acceptance.rate(0) > 0.99 and acceptance.rate(1) < 0.01
    assert acceptance.rate(2) == pytest.approx(0.9 * acceptance.rate(1))
    of_another = Acceptance(3, memory=32, prior=acceptance)
    assert of_another.rate(0) == pytest.approx(acceptance.rate(0)), "others say what to expect"
