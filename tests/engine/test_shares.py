"""Owners of requests share what an engine has: seats, blocks, the budget of prompts. Integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import pytest

from qnext.engine.policy.prefix_node import Tokens
from qnext.engine.policy.request import Request, SamplingParams
from qnext.engine.policy.scheduler import Scheduler
from qnext.engine.policy.sequence import Sequence
from qnext.engine.policy.shares import IDLE_SECONDS, QUANTUM
from tests.engine.schedules import answer, limits, step

_numbers = count(1)


def ask(scheduler: Scheduler, owner: str, num_prompt: int, max_tokens: int) -> Request:
    """A request whose prompt nobody else has."""
    number = next(_numbers)
    prompt = tuple(range(100_000 * number, 100_000 * number + num_prompt))
    request = Request(
        f"{owner}{number}",
        prompt,
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_ids=frozenset({-1}),
        salt=f"{owner}-{number}",
        owner=owner,
    )
    scheduler.add(request)
    return request


def held(scheduler: Scheduler, request: Request) -> Sequence:
    return scheduler.sequences[request.id]


def running(scheduler: Scheduler) -> dict[str, int]:
    return dict(sorted(scheduler._turns.seats.held.items()))


def steps_until(scheduler: Scheduler, is_done: Callable[[], bool], most: int = 10_000) -> int:
    for number in range(most):
        if is_done():
            return number
        step(scheduler)
    raise AssertionError(f"not within {most} steps")


def make(**changes: float | None) -> Scheduler:
    values = {
        "max_num_seqs": 8,
        "num_slots": 20,
        "num_blocks": 2_000,
        "chunk_size": 1,
        "has_prefix_cache": True,
        "max_num_batched_tokens": 256,
        "max_draft_tokens": 0,
    }
    return Scheduler(limits(**{**values, **changes}))


@pytest.mark.parametrize("has_cache", [True, False])
def test_forty_long_answers_of_one_owner_do_not_keep_another_waiting(has_cache: bool) -> None:
    scheduler = make(has_prefix_cache=has_cache)
    flood = [ask(scheduler, "a", 100, 300) for _ in range(40)]
    for _ in range(20):
        step(scheduler)
    assert running(scheduler) == {"a": 8}, "alone it may have all seats"
    other = ask(scheduler, "b", 20, 5)
    assert steps_until(scheduler, lambda: bool(other.output_ids)) <= 2
    assert steps_until(scheduler, lambda: other.finish_reason is not None) <= 5
    assert steps_until(scheduler, lambda: running(scheduler) == {"a": 8}) <= 1
    ended: list[Request] = []
    while scheduler.has_unfinished:
        step(scheduler)
        ended += [r for r in flood if r.finish_reason is not None and r not in ended]
    assert all(len(r.output_ids) == 300 for r in flood)
    assert ended[:7] == flood[:7] and set(ended) == set(flood), "who was sent back was the newest"


def test_seats_are_shared_by_all_that_want_some() -> None:
    scheduler = make()
    for _ in range(20):
        ask(scheduler, "a", 30, 200)
    for _ in range(10):
        step(scheduler)
    for owner, many in (("b", 6), ("c", 1)):
        for _ in range(many):
            ask(scheduler, owner, 30, 200)
    for _ in range(20):
        step(scheduler)
    assert running(scheduler) == {"a": 4, "b": 3, "c": 1} or running(scheduler) == {"a": 3, "b": 4, "c": 1}
    before = scheduler.num_preemptions
    for _ in range(50):
        step(scheduler)
    assert scheduler.num_preemptions == before, "once shared they stay so"


def test_more_owners_than_seats_have_one_each_and_take_turns() -> None:
    scheduler = make(max_num_seqs=2)
    asked = [ask(scheduler, owner, 10, 20) for owner in "aaaabbbbccccdddd"]
    first: dict[str, int] = {}
    for number in count():
        if not scheduler.has_unfinished:
            break
        step(scheduler)
        assert max(running(scheduler).values(), default=0) <= 2
        for r in asked:
            if r.output_ids:
                first.setdefault(r.owner, number)
    assert max(first.values()) <= 45, "nobody waits for all of another's requests"


def test_a_short_question_is_read_beside_a_flood_of_long_prompts() -> None:
    """Its first token comes after as many steps as if all others of its owner were the only ones."""
    scheduler = make(num_blocks=60_000)
    for _ in range(40):
        ask(scheduler, "a", 20_000, 50)
    for _ in range(30):
        step(scheduler)
    short = ask(scheduler, "b", 200, 5)
    assert steps_until(scheduler, lambda: bool(short.output_ids)) <= 4
    long = ask(scheduler, "b", 2_000, 5)
    assert steps_until(scheduler, lambda: bool(long.output_ids)) <= 2_000 // 120 + 4


def test_many_short_prompts_of_one_owner_do_not_outrun_a_long_one_of_another() -> None:
    scheduler = make(num_blocks=60_000)
    long = ask(scheduler, "b", 4_000, 5)
    step(scheduler)

    def flood() -> bool:
        while scheduler.num_waiting < 20:
            ask(scheduler, "a", 120, 1)
        return bool(long.output_ids)

    assert steps_until(scheduler, flood) <= 4_000 // 120 + 4


def test_a_budget_of_one_chunk_goes_to_all_owners_in_turn() -> None:
    scheduler = make(chunk_size=64, max_num_batched_tokens=64 + 7, num_blocks=4_000)
    prompts = [ask(scheduler, owner, 640, 1) for owner in "aabbc"]
    seen: Counter[str] = Counter()
    for _ in range(15):
        seen.update(s.request_id[0] for s in step(scheduler).sequences)
    assert min(seen.values()) >= 4 and set(seen) == set("abc")
    while scheduler.has_unfinished:
        step(scheduler)
    assert all(len(r.output_ids) == 1 for r in prompts)


def test_nothing_of_the_budget_is_left_over() -> None:
    scheduler = make(num_blocks=60_000)
    for owner in "aabbc":
        ask(scheduler, owner, 1_000, 1)
    for _ in range(3):
        step(scheduler)
    for _ in range(5):
        assert sum(len(s.token_ids) for s in step(scheduler).sequences) == 256


def test_whoever_holds_most_blocks_makes_room_for_what_grows() -> None:
    """Six answers fill the memory; the youngest of all, of another owner and small, is not sent back for them."""
    scheduler = make(num_blocks=100, num_slots=30)
    for _ in range(6):
        ask(scheduler, "a", 100, 600)
    for _ in range(30):
        step(scheduler)
    small = ask(scheduler, "b", 50, 400)
    sequence = held(scheduler, small)
    steps_until(scheduler, lambda: bool(small.output_ids), 40)
    assert steps_until(scheduler, lambda: small.finish_reason is not None) <= 400
    assert sequence.num_admissions == 1 and scheduler.num_preemptions > 0
    while scheduler.has_unfinished:
        step(scheduler)


def test_who_found_no_room_is_passed_within_a_share_and_not_for_ever() -> None:
    scheduler = make(num_blocks=100, num_slots=30)
    ask(scheduler, "a", 700, 300)
    step(scheduler)
    large = ask(scheduler, "c", 1_400, 2)  # more than there is beside the first
    gone: list[Request] = []

    def flood() -> bool:
        while scheduler.num_waiting < 4:
            gone.append(ask(scheduler, "b", 100, 10))
        return large.finish_reason is not None

    steps_until(scheduler, flood, 3_000)
    assert sum(r.finish_reason is not None for r in gone) > 10, "small ones went past it"


def test_one_owner_takes_no_memory_within_anothers_share_to_run_more() -> None:
    """Cached prefixes of another stay while it is there, and yield when it has asked for nothing for long."""
    now = [0.0]
    scheduler = Scheduler(
        limits(max_num_seqs=8, num_slots=40, num_blocks=100, has_prefix_cache=True, chunk_size=1, max_draft_tokens=0),
        clock=lambda: now[0],
    )
    mine = ask(scheduler, "b", 599, 2)
    steps_until(scheduler, lambda: mine.finish_reason is not None)

    def num_cached() -> int:
        assert scheduler.prefixes is not None
        return scheduler.prefixes.lookup(mine.prompt_ids, salt=mine.salt, limit=598).num_tokens

    assert num_cached() == 598
    flood = [ask(scheduler, "a", 300, 60) for _ in range(40)]
    while scheduler.has_unfinished:
        step(scheduler)
        assert num_cached() == 598
    assert all(len(r.output_ids) == 60 for r in flood)
    now[0] = IDLE_SECONDS + 1
    for _ in range(8):
        ask(scheduler, "a", 300, 60)
    while scheduler.has_unfinished:
        step(scheduler)
    assert num_cached() == 0


def test_a_request_that_needs_all_memory_gets_it() -> None:
    scheduler = make(num_blocks=40, num_slots=30)
    mine = ask(scheduler, "b", 200, 2)
    steps_until(scheduler, lambda: mine.finish_reason is not None)
    large = ask(scheduler, "a", 600, 41)
    assert steps_until(scheduler, lambda: large.finish_reason is not None) < 60


def test_a_request_that_is_sent_back_has_come_further_than_before() -> None:
    """One that asks again and again cannot keep another from going on."""
    scheduler = make(max_num_seqs=2, has_prefix_cache=False, num_slots=2)
    long = [ask(scheduler, "a", 50, 100) for _ in range(2)]

    def pester() -> bool:
        if not scheduler.num_waiting_of("b") and running(scheduler).get("b", 0) == 0:
            ask(scheduler, "b", 5, 1)
        return all(r.finish_reason is not None for r in long)

    assert steps_until(scheduler, pester) < 100 * (2 + 2 * QUANTUM)


def test_parked_requests_hold_nothing_and_go_on_where_they_were() -> None:
    scheduler = make(max_num_seqs=2, num_slots=6)
    first, second, third = (ask(scheduler, "a", 100, 30) for _ in range(3))
    for _ in range(10):
        step(scheduler)
    sequence = held(scheduler, first)
    scheduler.park(first.id)
    scheduler.park(first.id)
    assert sequence.slot is None and not sequence.blocks and scheduler.num_parked == 1
    for _ in range(10):
        step(scheduler)
    assert third.output_ids and len(first.output_ids) < 12
    for r in (second, third):
        scheduler.park(r.id)
    assert scheduler.plan() is None and not scheduler.has_unfinished
    scheduler.check_integrity()
    scheduler.abort(third.id)
    for r in (second, first):
        scheduler.resume(r.id)
    while scheduler.has_unfinished:
        step(scheduler)
    assert len(first.output_ids) == len(second.output_ids) == 30
    assert scheduler.num_parked == 0 and sequence.num_reused_tokens >= 100, "it went on from what was cached"


def test_the_oldest_of_an_owner_is_first() -> None:
    scheduler = make(max_num_seqs=1)
    asked = [ask(scheduler, owner, 10, 2) for owner in "aabab"]
    order: list[Request] = []
    while scheduler.has_unfinished:
        step(scheduler)
        order += [r for r in asked if r.output_ids and r not in order]
    assert [r for r in order if r.owner == "a"] == [r for r in asked if r.owner == "a"]
    assert "".join(r.owner for r in order) == "ababa"


@dataclass
class Stored:
    """A prefix that is read in two looks, and what was asked of it."""

    num_tokens: int
    id: int = 0
    num_starts: int = 0
    looks_left: int = 2
    is_good: bool = True

    @property
    def is_open(self) -> bool:
        self.looks_left -= 1
        return self.looks_left > 0

    def start(self) -> None:
        self.num_starts += 1
        self.looks_left = 2

    def wait(self, seconds: float) -> None: ...


class Shelf:
    """An archive that has all of every prompt but its last token."""

    chunk_tokens = 16
    saves_at_once = False

    def find(self, tokens: Tokens, *, salt: str, above: int, limit: int) -> Stored | None:
        return Stored(limit) if limit > above else None

    def held_bytes(self, owner: str) -> tuple[int, int]:
        return 0, 0


def test_a_prefix_that_came_for_one_owner_keeps_no_other_owner_waiting() -> None:
    """It is there, but its request finds no room; another owner's prefix is read in the meantime."""
    scheduler = Scheduler(
        limits(max_num_seqs=8, num_slots=40, num_blocks=100, has_prefix_cache=True, chunk_size=1, max_draft_tokens=0),
        Shelf(),
    )
    first = [ask(scheduler, "a", 700, 300) for _ in range(3)]
    for _ in range(12):
        if (plan := scheduler.plan()) is not None:
            scheduler.commit(answer(plan))
    fetch = held(scheduler, first[2]).fetch
    assert first[1].output_ids and fetch is not None and fetch.is_good
    other = ask(scheduler, "b", 200, 2)
    sequence = held(scheduler, other)
    for _ in range(8):
        if (plan := scheduler.plan()) is not None:
            scheduler.commit(answer(plan))
        scheduler.check_integrity()
    assert other.finish_reason is not None and sequence.num_reused_tokens == 199
    assert first[0].finish_reason is None
