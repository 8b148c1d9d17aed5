"""Large work: the owners take turns, nothing is lost by leaving, and what is too much is refused."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from qnext.server.access.keys import KeyRing
from qnext.server.access.rates import KeyRates
from qnext.server.admin import ADMIN_ROUTES
from qnext.server.body import parsing
from qnext.server.errors import ApiError
from qnext.server.lanes import Budget, Lane
from qnext.server.limits import MAX_JSON_CONTAINERS, MAX_JSON_MEMBERS, MAX_JSON_VALUES
from qnext.server.long_json import LongList, json_parts, whole_json
from qnext.server.table import public_routes
from tests.server.serving import Running, running_server

ROUTES = {route.path: route for route in public_routes()}


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("route", [*public_routes(), *ADMIN_ROUTES], ids=lambda route: f"{route.method} {route.path}")
def test_whatever_reads_a_body_counts(route: Any) -> None:
    """Work that grows with a body is of a class that rates and turns hold for, and nothing else is."""
    assert (route.body is not None) == (route.limit in ("generation", "work")) or route.path == "/live/stream"


def test_owners_take_turns() -> None:
    async def test() -> None:
        lane = Lane("test", num_threads=1, per_owner=1, max_waiting=50)
        gate, order = threading.Event(), []
        first = asyncio.ensure_future(lane.run("a", gate.wait))
        await asyncio.sleep(0)
        jobs = [asyncio.ensure_future(lane.run("a", lambda n=n: order.append(f"a{n}"))) for n in range(20)]
        jobs += [asyncio.ensure_future(lane.run("b", lambda n=n: order.append(f"b{n}"))) for n in range(2)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *jobs)
        assert order.index("b0") <= 1 and order.index("b1") <= 3, order
        assert [name for name in order if name[0] == "a"] == [f"a{n}" for n in range(20)]
        lane.close()

    run(test)


@pytest.mark.parametrize("first_to_leave", ["first", "last"])
def test_who_leaves_in_the_moment_of_his_turn_loses_no_thread(first_to_leave: str) -> None:
    """A task that is cancelled hears of it one round of the loop later than its turn does."""

    async def test() -> None:
        lane = Lane("test", num_threads=2, per_owner=2, max_waiting=50)
        for _ in range(30):
            gate = threading.Event()
            jobs = [asyncio.ensure_future(lane.run(name, gate.wait)) for name in "aabbbcab"]
            await asyncio.sleep(0)
            gate.set()
            await jobs[0 if first_to_leave == "first" else 1]
            for job in jobs[2:] if first_to_leave == "first" else reversed(jobs[2:]):
                job.cancel()
            late = asyncio.ensure_future(lane.run("b", lambda: 7))
            assert all(
                isinstance(r, (bool, asyncio.CancelledError))
                for r in await asyncio.gather(*jobs, return_exceptions=True)
            )
            assert await late == 7
            assert lane.num_waiting == 0
        assert await asyncio.gather(*(lane.run(name, lambda: 1) for name in "abcdefgh")) == [1] * 8
        lane.close()

    run(test)


def test_one_owner_never_has_all_threads() -> None:
    async def test() -> None:
        lane = Lane("test", num_threads=2, per_owner=1, max_waiting=50)
        gate = threading.Event()
        slow = [asyncio.ensure_future(lane.run("a", gate.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await lane.run("b", lambda: 5) == 5
        gate.set()
        await asyncio.gather(*slow)
        lane.close()

    run(test)


def test_who_leaves_gives_his_turn_back_when_his_thread_is_free() -> None:
    async def test() -> None:
        lane = Lane("test", num_threads=1, per_owner=1, max_waiting=50)
        gate, started, stopped = threading.Event(), threading.Event(), threading.Event()
        running = asyncio.ensure_future(lane.run("a", lambda: started.set() or gate.wait(), stop=stopped.set))
        while not started.is_set():
            await asyncio.sleep(0.001)
        waiting = [asyncio.ensure_future(lane.run(owner, lambda: 1)) for owner in ("a", "b", "c")]
        await asyncio.sleep(0)
        running.cancel()
        waiting[1].cancel()
        await asyncio.sleep(0.05)
        assert stopped.is_set() and not waiting[0].done(), "the thread still works"
        gate.set()
        assert await waiting[0] == 1 and await waiting[2] == 1
        assert lane.num_waiting == 0 and await lane.run("a", lambda: 2) == 2
        lane.close()

    run(test)


def test_too_many_that_wait_are_refused() -> None:
    async def test() -> None:
        lane = Lane("test", num_threads=1, per_owner=1, max_waiting=2, max_all=3)
        gate = threading.Event()
        held = [asyncio.ensure_future(lane.run(owner, gate.wait)) for owner in ("a", "a", "a", "b")]
        await asyncio.sleep(0)
        for owner, status in (("a", 429), ("c", 503)):
            with pytest.raises(ApiError) as caught:
                await lane.run(owner, gate.wait)
            assert caught.value.status == status and int(caught.value.headers["Retry-After"]) >= 1
        gate.set()
        await asyncio.gather(*held)
        lane.close()

    run(test)


def test_a_job_that_fails_frees_its_thread() -> None:
    async def test() -> None:
        lane = Lane("test", num_threads=1, per_owner=1, max_waiting=2)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await lane.run("a", lambda: 1 // 0)
        lane.close()

    run(test)


def test_bodies_have_a_budget() -> None:
    budget = Budget(most=100, per_owner=60)
    budget.take("a", 60)
    for owner, count, status in (("a", 1, 429), ("b", 41, 503)):
        with pytest.raises(ApiError) as caught:
            budget.take(owner, count)
        assert caught.value.status == status
    budget.give_back("a", 60)
    budget.take("b", 60)


# ---- reading bodies ----


@pytest.mark.parametrize("count", [3, 400])
@pytest.mark.parametrize("fault", [None, {"role": "nobody"}, 5, {"role": "user", "content": [{"type": 5}]}])
def test_long_lists_are_read_as_short_ones(count: int, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Item by item, the body and its first fault are those of the whole."""
    turns: list[Any] = [{"role": "user", "content": [{"type": "text", "text": f"{n}"}]} for n in range(count)]
    if fault is not None:
        turns[count - 2] = fault
    raw = orjson.dumps({"messages": turns, "temperature": 0.5})

    def read() -> Any:
        try:
            return parsing.parse_body(raw, ROUTES["/v1/chat/completions"].body).model_dump()
        except ApiError as error:
            return error.message, error.param

    found = read()
    monkeypatch.setattr(parsing, "_MANY_ITEMS", 10**9)
    assert found == read()
    assert isinstance(found, dict) == (fault is None)


@pytest.mark.parametrize("pad", range(9))
def test_marks_inside_texts_do_not_count(pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the slices end: in a text, in an escape, between two."""
    monkeypatch.setattr(parsing, "_SLICE", 16)
    text = '[{:,\\"\\\\' * (MAX_JSON_CONTAINERS // 2 + 10)
    raw = orjson.dumps({"model": "m" * pad, "prompt": text, "x": [[1], {"a": "\\"}, '\\\\"']})
    body: Any = parsing.parse_body(raw, ROUTES["/v1/completions"].body)
    assert body.prompt == text


@pytest.mark.parametrize(
    ("field", "what"),
    [
        (b"[" + b"[]," * MAX_JSON_CONTAINERS + b"[]]", "objects and lists"),
        (b"{" + b'"a":1,' * MAX_JSON_MEMBERS + b'"b":1}', "members of objects"),
        (b"[" + b"1," * (MAX_JSON_VALUES + 1) + b"1]", "values"),
    ],
)
def test_too_many_marks_are_refused(field: bytes, what: str) -> None:
    with pytest.raises(ApiError, match=what):
        parsing.parse_body(b'{"prompt":"a \\" b","x":' + field + b"}", ROUTES["/v1/completions"].body)


def test_of_many_unknown_members_the_known_ones_are_kept() -> None:
    members = {f"k{number}": number for number in range(2_000)} | {"prompt": "a", "temperature": 0.5}
    body: Any = parsing.parse_body(orjson.dumps(members), ROUTES["/v1/completions"].body)
    assert (body.prompt, body.temperature) == ("a", 0.5) and len(body.model_extra) == parsing._MAX_UNKNOWN


def test_the_collector_works_again_after_a_large_body() -> None:
    for raw in (b'{"prompt":"' + b"a" * 100_000 + b'"}', b'{"prompt":"' + b"a" * 100_000):
        with contextlib.suppress(ApiError):
            parsing.parse_body(raw, ROUTES["/v1/completions"].body)
        assert gc.isenabled()


# ---- writing answers ----


@pytest.mark.parametrize("count", [0, 1, 7, 2_048, 2_049, 40_000])
def test_a_long_list_in_parts_is_the_whole(count: int) -> None:
    values = [{"n": number} for number in range(count)]
    document = {"a": [LongList(count, lambda i, j: values[i:j]), 5], "b": LongList.of_values(list(range(count)))}
    found = json_parts(document)
    parts = [found] if isinstance(found, bytes) else list(found)
    assert (
        json.loads(b"".join(parts))
        == json.loads(whole_json(document))
        == {
            "a": [values, 5],
            "b": list(range(count)),
        }
    )
    assert max(map(len, parts)) < 200_000


# ---- through the server ----


@pytest.fixture(scope="module")
def limited(chat_model: Any) -> Iterator[Running]:
    keys = KeyRing(plain=["k"])
    with running_server(chat_model, keys=keys) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
        ("/v1/messages/count_tokens", {"model": "claude-3", "messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_tokenizing_counts_against_the_rates(
    limited: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    """Requests and requests at once count, tokens do not; and a refused one is not even read."""
    ring = limited.server.keys
    key = replace(ring.keys[0], requests_per_minute=3, tokens_per_minute=1, max_parallel=2)
    monkeypatch.setattr(ring, "find", lambda secret: key)
    monkeypatch.setattr(limited.server, "rates", KeyRates())
    with limited.client("k") as client:
        answers = [client.post(path, json=body) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[0].headers["x-ratelimit-remaining-requests"] == "2"
        assert int(answers[3].headers["retry-after"]) >= 1
        unread = client.post("/v1/completions", content=b"no JSON", headers={"Content-Type": "application/json"})
        assert unread.status_code == 429
    monkeypatch.setattr(limited.server, "rates", rates := KeyRates())
    assert rates.check(key, 0) is None and rates.check(key, 0) is None
    with limited.client("k") as client:
        answer = client.post(path, json=body)
        assert answer.status_code == 429 and "at once" in answer.text
