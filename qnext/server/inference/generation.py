"""The answers to one prompt while they are generated, as the event loop sees them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from qnext.engine.policy.request import FinishReason, Request, SampledToken
from qnext.server.errors import ApiError
from qnext.server.limits import Limits

if TYPE_CHECKING:
    from qnext.engine import SamplingParams
    from qnext.engine.policy.request import Guide


class TokenPrompt(NamedTuple):
    """The input of a generation: token ids, sampling parameters, and the state of a constraint if there is one."""

    ids: Sequence[int]
    params: SamplingParams
    guide: Guide | None = None


@dataclass(frozen=True)
class Update:
    """What happened to one answer of a generation: a token, its end, or both."""

    index: int
    token: SampledToken | None
    finish_reason: FinishReason | None


class GenerationQueue(Protocol):
    """Runs generations: an EngineWorker."""

    limits: Limits

    def enqueue(self, generation: Generation) -> None: ...

    def abort(self, generation: Generation, index: int | None = None) -> None: ...

    def rest(self, generation: Generation, *, is_parked: bool) -> None: ...


class Silence:
    """How long a stream may go without a byte, on the clock of the event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.end()

    def end(self) -> None:
        """Note that something was sent."""
        self._since = time.monotonic()

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._since + self._seconds - time.monotonic())

    @property
    def is_long(self) -> bool:
        return self.seconds_left == 0.0


class Generation:
    """The answers to one prompt, in the event loop. Leaving its `async with` ends the answers that have not ended."""

    def __init__(
        self,
        worker: GenerationQueue,
        prompt: TokenPrompt,
        *,
        owner: str,
        salt: str,
        request_id: str,
        adapter: str | None = None,
    ) -> None:
        self.prompt_ids = prompt.ids
        self.params = prompt.params
        self.guide = prompt.guide
        self.owner = owner
        self.salt = salt
        self.adapter = adapter
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
        self._open = set(range(prompt.params.n))  # answers that have not ended

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
        """Tokens of prompt and answers so far."""
        return len(self.prompt_ids) + sum(len(request.output_ids) for request in self.requests)

    @property
    def phase(self) -> str:
        """The present phase: "queue", "prompt", "answer", or "done" when all answers have ended."""
        if self.has_ended:
            return "done"
        started = [request for request in self.requests if request.times.scheduled is not None]
        if not started:
            return "queue"
        return "answer" if any(request.times.first_token is not None for request in started) else "prompt"

    async def updates(self) -> AsyncIterator[list[Update]]:
        """The updates since the last call, until all answers have ended; [] after a long silence.

        Raises ApiError where the engine refuses or loses the request.
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
        """Wait for news, at most so long. A future and a timer cost less than a task for each token."""
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
        """End one answer now, because its reader has found a stop string in it."""
        # Its last token may have come by now, and been counted.
        self._open.discard(index)
        self._worker.abort(self, index)
        if not self._open:
            self._wake()

    def rest(self, *, is_parked: bool) -> None:
        """Park the answers while the client does not read, or continue them."""
        if self._open:
            self._worker.rest(self, is_parked=is_parked)

    def deliver(self, updates: Sequence[Update], failure: ApiError | None = None) -> None:
        """Add updates. The worker has the event loop call this."""
        self._updates.extend(updates)
        self._failure = failure or self._failure
        self._wake()
