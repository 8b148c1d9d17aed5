"""A generation seen from the event loop: what has ended has ended once, whoever said so first."""

from __future__ import annotations

import asyncio
from typing import Any

from qnext.engine import SamplingParams
from qnext.engine.request import SampledToken
from qnext.server.limits import Limits
from qnext.server.worker import Generation, Update


class Worker:
    """Takes what a generation asks of its worker, and does nothing."""

    limits = Limits()

    def __init__(self) -> None:
        self.aborts: list[int | None] = []

    def enqueue(self, generation: Generation) -> None:
        pass

    def abort(self, generation: Generation, index: int | None = None) -> None:
        self.aborts.append(index)


async def read(num_answers: int, batches: list[list[Update]], stop_at: Update) -> tuple[list[Update], Worker]:
    """All updates of a generation whose reader stops the answer of `stop_at` when it sees it."""
    worker: Any = Worker()
    params = SamplingParams(n=num_answers)
    generation = Generation(worker, [1], params, owner="", salt="", guide=None, request_id="r")
    seen: list[Update] = []
    async with generation:
        generation.deliver(batches[0])
        async for updates in generation.updates():
            for update in updates:
                seen.append(update)
                if update is stop_at:
                    generation.stop(update.index)
            if batches[1:]:
                generation.deliver(batches.pop(1))
    return seen, worker


def token(index: int, finish_reason: Any = None) -> Update:
    return Update(index, SampledToken(5), finish_reason)


def test_a_stop_beside_the_end_of_the_same_answer() -> None:
    """Tokens come several at once: a stop string may be found just before the token that ended the answer anyway."""
    found = token(0)
    seen, worker = asyncio.run(asyncio.wait_for(read(1, [[found, token(0, "length")]], found), 5.0))
    assert len(seen) == 2 and worker.aborts == [0]


def test_the_end_of_a_stopped_answer_is_not_that_of_another() -> None:
    found = token(0)
    late = [token(0, "length"), token(1)]
    seen, worker = asyncio.run(asyncio.wait_for(read(2, [[found], late, [token(1, "stop")]], found), 5.0))
    assert [update.finish_reason for update in seen if update.index == 1] == [None, "stop"]
    assert worker.aborts == [0], "nothing is left that would have to be ended at the exit"
