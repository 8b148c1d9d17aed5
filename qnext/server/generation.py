"""The answers to one prompt while they are written, as the event loop sees them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnext.engine.request import FinishReason, Request, SampledToken
from qnext.server.errors import ApiError

if TYPE_CHECKING:
    from qnext.engine import SamplingParams
    from qnext.engine.request import Guide
    from qnext.server.worker import EngineWorker


@dataclass(frozen=True)
class Update:
    """What happened to one answer of a generation: a token, its end, or both."""

    index: int
    token: SampledToken | None
    finish_reason: FinishReason | None


class Silence:
    """How long a stream may go without a byte, on the event loop's clock."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.end()

    def end(self) -> None:
        """Something was sent."""
        self._since = time.monotonic()

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._since + self._seconds - time.monotonic())

    @property
    def is_long(self) -> bool:
        return self.seconds_left == 0.0


class Generation:
    """The answers to one prompt, from the event loop's side. Leaving its `async with` ends what has not ended.

    Times are of time.perf_counter, of this process.
    """

    def __init__(
        self,
        worker: EngineWorker,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        owner: str,
        salt: str,
        guide: Guide | None,
        request_id: str,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.params = params
        self.owner = owner
        self.salt = salt
        self.guide = guide
        self.request_id = request_id
        self.requests: list[Request] = []  # once the engine has them
        self.is_parked = False  # it has no seat, for nobody reads it; the worker's
        self.deadline = time.monotonic() + worker.limits.request_seconds
        self.queue_deadline = time.monotonic() + worker.limits.queue_seconds
        self.silence = Silence(worker.limits.ping_seconds)
        self._worker = worker
        self._updates: deque[Update] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: ApiError | None = None
        self._open = set(range(params.n))  # answers that have not ended

    async def __aenter__(self) -> Generation:
        self._worker.enqueue(self)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._open:
            self._worker.abort(self)

    @property
    def has_ended(self) -> bool:
        return not self._open

    @property
    def num_tokens(self) -> int:
        """Of prompt and answers, so far."""
        return len(self.prompt_ids) + sum(len(request.output_ids) for request in self.requests)

    @property
    def phase(self) -> str:
        """Where an abort would find it: queue, prompt or answer; "done" when it has ended."""
        if self.has_ended:
            return "done"
        started = [request for request in self.requests if request.times.scheduled is not None]
        if not started:
            return "queue"
        return "answer" if any(request.times.first_token is not None for request in started) else "prompt"

    async def updates(self) -> AsyncIterator[list[Update]]:
        """What came since the last time, until all answers have ended; [] when the silence has become long.

        Raises ApiError where the request is refused, or lost.
        """
        while self._open:
            if not self._updates and self._failure is None:
                await self._wait(self.silence.seconds_left)
                if not self._updates and self._failure is None:
                    if self._open and self.silence.is_long:
                        self.silence.end()
                        yield []
                    continue
            found = list(self._updates)
            self._updates.clear()
            self._open -= {update.index for update in found if update.finish_reason is not None}
            if found:
                yield found
            if self._failure is not None:
                raise self._failure

    async def _wait(self, seconds: float) -> None:
        """Until something came, or for so long. A future and a timer: a task for each token would cost more."""
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stop(self, index: int) -> None:
        """End one answer now: it is complete, for its reader."""
        # Its last token may have come by now, and been counted.
        self._open.discard(index)
        self._worker.abort(self, index)
        if not self._open:
            self._wake()

    def rest(self, *, is_parked: bool) -> None:
        """Give up the seats in the engine while nobody reads, or go on."""
        if self._open:
            self._worker.rest(self, is_parked=is_parked)

    def deliver(self, updates: Sequence[Update], failure: ApiError | None = None) -> None:
        """Called in the event loop by the worker."""
        self._updates.extend(updates)
        self._failure = failure or self._failure
        self._wake()
