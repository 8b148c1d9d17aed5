"""The generations of one request as one source of updates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from qnext.server.exchange import Exchange
from qnext.server.inference.generation import Generation, Silence, TokenPrompt, Update


@dataclass(frozen=True)
class Source:
    """The source of the updates of a request's answers.

    `of_prompts` are the generations that have begun, by the number of their prompt. With `n` answers of each prompt,
    answer `prompt * n + index` of the source is answer `index` of that prompt. `updates` and `stop` are as in
    `Generation`.
    """

    of_prompts: Mapping[int, Generation]
    silence: Silence
    updates: Callable[[], AsyncIterator[list[Update]]]
    stop: Callable[[int], None]


@asynccontextmanager
async def open_source(
    exchange: Exchange, prompts: Sequence[TokenPrompt], *, salt: str | None = None
) -> AsyncIterator[Source]:
    """Generate for all prompts at once. Leaving the context ends the answers that have not ended. `updates` raises
    ApiError."""
    if len(prompts) == 1:
        async with exchange.generate(prompts[0], salt=salt) as only:
            yield Source({0: only}, only.silence, only.updates, only.stop)
        return
    many = _Many(exchange, prompts, salt)
    tasks = [asyncio.ensure_future(many.run(number)) for number in range(len(prompts))]
    try:
        yield Source(many.of_prompts, many.silence, many.updates, many.stop)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Many:
    """Several generations, each run by a task of its own; what they bring comes through one queue."""

    def __init__(self, exchange: Exchange, prompts: Sequence[TokenPrompt], salt: str | None) -> None:
        self.silence = Silence(exchange.server.limits.ping_seconds)
        self.of_prompts: dict[int, Generation] = {}
        self._exchange = exchange
        self._prompts = prompts
        self._salt = salt
        self._n = prompts[0].params.n
        self._queue: asyncio.Queue[tuple[int, list[Update]] | BaseException | None] = asyncio.Queue()

    async def run(self, number: int) -> None:
        """The generation of one prompt, to its end."""
        try:
            async with self._exchange.generate(self._prompts[number], salt=self._salt, index=number) as generation:
                generation.silence = self.silence
                self.of_prompts[number] = generation
                async for updates in generation.updates():
                    self._queue.put_nowait((number, updates))
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    async def updates(self) -> AsyncIterator[list[Update]]:
        num_open = len(self._prompts)
        while num_open:
            entry = await self._queue.get()
            if isinstance(entry, BaseException):
                raise entry
            if entry is None:
                num_open -= 1
                continue
            number, updates = entry
            first = number * self._n
            yield [replace(update, index=first + update.index) for update in updates]

    def stop(self, index: int) -> None:
        number, answer = divmod(index, self._n)
        self.of_prompts[number].stop(answer)
