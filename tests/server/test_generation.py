"""A generation seen from the event loop, with a worker that is a script: what ends it, and what does not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from qnext.engine import SamplingParams
from qnext.engine.policy.request import SampledToken
from qnext.server.inference.generation import Generation, TokenPrompt, Update
from qnext.server.limits import Limits


def generation(*, n: int) -> tuple[Generation, list[int | None]]:
    aborted: list[int | None] = []
    worker: Any = SimpleNamespace(
        limits=Limits(), enqueue=lambda one: None, abort=lambda one, index=None: aborted.append(index)
    )
    prompt = TokenPrompt([1], SamplingParams(n=n, max_tokens=8))
    made = Generation(worker, prompt, owner="", salt="", request_id="r")
    return made, aborted


def token(index: int, *, ends: bool = False) -> Update:
    return Update(index, SampledToken(7), "length" if ends else None)


def test_an_answer_that_its_reader_ended_counts_once() -> None:
    """Its reader found a stop in the first of two tokens that came together, of which the second was the last."""

    async def read() -> list[Update]:
        found: list[Update] = []
        one, _ = generation(n=2)
        async with one:
            one.deliver([token(0), token(0, ends=True)])
            async for updates in one.updates():
                found += updates
                if len(found) == 2:
                    one.stop(0)
                    assert not one.has_ended, "the other answer is still open"
                    one.deliver([token(1), token(1, ends=True)])
        assert one.has_ended
        return found

    assert [update.index for update in asyncio.run(asyncio.wait_for(read(), 5.0))] == [0, 0, 1, 1]


def test_whoever_waits_hears_that_another_task_ended_the_last_answer() -> None:
    async def read() -> list[list[Update]]:
        one, aborted = generation(n=1)
        found = []
        async with one:
            one.deliver([token(0)])
            async for updates in one.updates():
                found.append(updates)
                asyncio.get_running_loop().call_later(0.01, one.stop, 0)
        assert aborted == [0]
        return found

    (only,) = asyncio.run(asyncio.wait_for(read(), 5.0))
    assert [update.index for update in only] == [0]


def test_nobody_hears_of_an_answer_that_ended_while_others_go_on() -> None:
    """What wakes a stream without news would be written as a ping."""

    async def read() -> list[list[Update]]:
        one, _ = generation(n=2)
        found = []
        loop = asyncio.get_running_loop()
        async with one:
            one.deliver([token(0)])
            async for updates in one.updates():
                if not found:
                    loop.call_later(0.01, one.stop, 0)
                    loop.call_later(0.05, one.deliver, [token(1, ends=True)])
                found.append(updates)
        return found

    assert [len(updates) for updates in asyncio.run(asyncio.wait_for(read(), 5.0))] == [1, 1]
