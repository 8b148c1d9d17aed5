"""Runs a batch: many requests at once, each answer written as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx2
import orjson

from qnext.client.batch_files import BadLine, BatchOutput, BatchRequest
from qnext.client.remote import headers_of, unreachable
from qnext.interrupts import ENDING_SIGNALS

if TYPE_CHECKING:
    from qnext.session.in_process import Ask

MAX_ATTEMPTS = 8
_MAX_WAIT = 60.0  # seconds between two attempts
_RETRIED = (429, 503)


@dataclass
class Tally:
    """The numbers of a batch so far: what was answered and what failed."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0  # answered by an earlier run
    prompt_tokens: int = 0
    output_tokens: int = 0
    stopped_by: int | None = None  # the signal
    began: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / max(time.monotonic() - self.began, 1e-9)

    def describe(self) -> str:
        """One line."""
        number = self.answered + self.failed
        skipped = f"; {self.skipped} answered before" if self.skipped else ""
        return (
            f"{number} requests: {self.answered} answered, {self.failed} failed{skipped}; "
            f"{self.prompt_tokens} tokens of prompts and {self.output_tokens} of answers "
            f"in {time.monotonic() - self.began:.1f} s, {self.tokens_per_second:.1f} tokens/s"
        )


class _Lost(Exception):
    """A request got no answer of HTTP."""


def run_batch(
    entries: Iterator[BatchRequest | BadLine],
    output: BatchOutput,
    asking: contextlib.AbstractAsyncContextManager[Ask],
    *,
    concurrency: int,
    tally: Tally,
    on_progress: Callable[[Tally], None],
) -> None:
    """Send every request whose answer the output does not hold yet, `concurrency` at once.

    Ctrl-C and SIGTERM end the batch early, between two lines; `tally.stopped_by` names the signal.
    """

    async def work(ask: Ask) -> None:
        for entry in entries:  # shared: each worker takes the next one
            if isinstance(entry, BatchRequest) and entry.custom_id in output.answered:
                tally.skipped += 1
            elif isinstance(entry, BadLine):
                _write(output, tally, entry.custom_id, error={"code": entry.code, "message": entry.message})
            else:
                await _answer(entry, ask, output, tally)
            on_progress(tally)

    async def main() -> None:
        with _interruptible(tally):
            async with asking as ask:
                tally.began = time.monotonic()
                await _all(work(ask) for _ in range(concurrency))

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        if tally.stopped_by is None:
            raise


async def _all(works: Iterator[Any]) -> None:
    """All of them, or the first one's fault; then none is left behind."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(request: BatchRequest, ask: Ask, output: BatchOutput, tally: Tally) -> None:
    try:
        response = await ask(request.url, orjson.dumps(request.body))
        body = orjson.loads(response.content)
    except _Lost as error:
        _write(output, tally, request.custom_id, error={"code": "no_answer", "message": str(error)})
        return
    except orjson.JSONDecodeError:
        message = f"{response.status_code}: an answer that is no JSON"
        _write(output, tally, request.custom_id, error={"code": "no_json", "message": message})
        return
    if response.status_code == 200 and isinstance(body, dict):
        usage = body.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        tally.prompt_tokens += counts.get("prompt_tokens") or counts.get("input_tokens") or 0
        tally.output_tokens += counts.get("completion_tokens") or counts.get("output_tokens") or 0
    request_id = response.headers.get("x-request-id")
    kept = {"status_code": response.status_code, "request_id": request_id, "body": body}
    _write(output, tally, request.custom_id, response=kept)


def _write(
    output: BatchOutput, tally: Tally, custom_id: str | None, *, response: Any = None, error: Any = None
) -> None:
    if response is not None and response["status_code"] == 200:
        tally.answered += 1
    else:
        tally.failed += 1
    name = f"batch_req_{secrets.token_hex(12)}"
    output.write({"id": name, "custom_id": custom_id, "response": response, "error": error})


@contextlib.contextmanager
def _interruptible(tally: Tally) -> Iterator[None]:
    """The first signal cancels the task that runs here; a second one ends the process as usual."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    previous = {number: signal.getsignal(number) for number in ENDING_SIGNALS}

    def stop(number: int) -> None:
        remove()
        tally.stopped_by = number
        if task is not None:
            task.cancel()

    def remove() -> None:
        for number, handler in previous.items():
            with contextlib.suppress(ValueError, RuntimeError):
                if loop.remove_signal_handler(number):
                    signal.signal(number, handler)

    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread
                loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        remove()


@contextlib.asynccontextmanager
async def ask_server(root: str, api_key: str | None, *, concurrency: int, request_seconds: float) -> AsyncIterator[Ask]:
    """Send requests to a running server. A request is sent again when the server is too busy or no connection can be
    made."""
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx2.Timeout(None if math.isinf(request_seconds) else request_seconds, connect=10.0, pool=None)
    async with httpx2.AsyncClient(
        base_url=root, headers=headers_of(api_key), limits=limits, timeout=timeout, follow_redirects=False
    ) as client:

        async def ask(path: str, content: bytes) -> httpx2.Response:
            attempt = 1
            while True:
                try:
                    response = await client.post(path, content=content)
                    if response.status_code not in _RETRIED or attempt == MAX_ATTEMPTS:
                        return response
                    seconds = retry_seconds(response, attempt)
                except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.RemoteProtocolError) as error:
                    if attempt == MAX_ATTEMPTS:
                        raise _Lost(str(unreachable(root, error))) from None
                    seconds = _backoff(attempt)
                except httpx2.HTTPError as error:
                    raise _Lost(str(unreachable(root, error))) from None
                attempt += 1
                await asyncio.sleep(seconds)

        yield ask


def retry_seconds(response: httpx2.Response, attempt: int) -> float:
    """Seconds to wait before the next try: the value of Retry-After, otherwise twice as long each time; at most a
    minute."""
    said = response.headers.get("retry-after", "")
    return min(float(said), _MAX_WAIT) if said.isascii() and said.isdigit() else _backoff(attempt)


def _backoff(attempt: int) -> float:
    return min(0.5 * 2.0**attempt, _MAX_WAIT) * random.uniform(0.8, 1.2)
