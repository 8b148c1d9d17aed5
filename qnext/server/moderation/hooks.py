"""Ways to ask an operator's hook. None of them computes in the server's event loop."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol

import httpx2
import orjson

from qnext.errors import UsageError
from qnext.server.moderation.judgement import BadReply, ModerationQuestion

_MAX_AT_ONCE = 64
_MAX_REPLY_BYTES = 4 << 20


class ModerationHook(Protocol):
    """Gives what `TextJudgement.of_reply` reads. It may raise anything, and be cancelled."""

    async def ask(self, question: ModerationQuestion) -> Any: ...


def hook_of(name: str, *, api_key: str | None = None) -> ModerationHook:
    """The hook with the name http://..., https://... or module:function. Raises UsageError for any other, and for a
    function that is not there."""
    if name.startswith(("http://", "https://")):
        return HttpHook(name, api_key)
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UsageError(f"--moderation {name}: must be an http(s) URL or module:function")
    if api_key is not None:
        raise UsageError("--moderation-api-key is for a URL")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the folder that the server was started in, as with `python -m`
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--moderation {name}: {error}") from None
    if not callable(found):
        raise UsageError(f"--moderation {name}: is no function")
    return CallableHook(found)


class HttpHook:
    """POSTs the question as JSON. No redirects, no proxies: texts go to this address alone."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx2.Limits(max_connections=_MAX_AT_ONCE)
        try:
            self._url = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise UsageError(f"--moderation {url}: {error}") from None
        self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=None, trust_env=False)

    async def ask(self, question: ModerationQuestion) -> Any:
        body = orjson.dumps(question.document())
        headers = {"Content-Type": "application/json", "X-Request-Id": question.request_id}
        async with self._client.stream("POST", self._url, content=body, headers=headers) as reply:
            if reply.status_code != 200:
                raise BadReply(f"status {reply.status_code}")
            parts, size = [], 0
            async for part in reply.aiter_bytes():
                size += len(part)
                if size > _MAX_REPLY_BYTES:
                    raise BadReply(f"more than {_MAX_REPLY_BYTES} bytes")
                parts.append(part)
        try:
            return orjson.loads(b"".join(parts))
        except orjson.JSONDecodeError:
            raise BadReply("no JSON") from None


class CallableHook:
    """Calls a function of Python with the question: a plain one in a thread of its own, a coroutine function in the
    event loop of another thread. At most 64 run at once; one that hangs keeps its place until it ends."""

    def __init__(self, function: Callable[[ModerationQuestion], Any]) -> None:
        self._function = function
        call = getattr(function, "__call__", None)  # noqa: B004 (of an object, it may be a coroutine function)
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        self._places = asyncio.Semaphore(_MAX_AT_ONCE)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, question: ModerationQuestion) -> Any:
        await self._places.acquire()
        future = self._begin(question)
        here = asyncio.get_running_loop()

        def leave(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                here.call_soon_threadsafe(self._places.release)

        future.add_done_callback(leave)
        return await asyncio.shield(asyncio.wrap_future(future))

    def _begin(self, question: ModerationQuestion) -> Future[Any]:
        if self._is_async:
            coroutine: Coroutine[Any, Any, Any] = self._function(question)
            return asyncio.run_coroutine_threadsafe(coroutine, self._other_loop())
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._function(question))
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a function that hangs does not keep the server from ending.
        threading.Thread(target=run, name="moderation", daemon=True).start()
        return future

    def _other_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="moderation", daemon=True).start()
        return self._loop
