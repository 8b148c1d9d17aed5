"""Replicas without a model, behind the application's own router. An answer has an event for each token asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import ray.util
from ray import serve
from ray_serve import application

from qnext.replicas.call import AnswerHead, RoutedCall
from qnext.replicas.direct import Hold
from qnext.replicas.door import Door

EVENT = b"data: {}\n\n"
_SECONDS = 0.02  # of an event


@serve.deployment
class Parrot:
    """Streams events, and nothing else."""

    async def __init__(self, values: Mapping[str, Any]) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._door = Door(self)
        await self._door.open(ray.util.get_node_ip_address())

    def record_replica_metadata(self) -> dict[str, Any]:
        return self._door.address

    async def hold(self, hold: Hold) -> None:
        await self._door.ended(hold.number)

    async def __call__(self, call: RoutedCall) -> AsyncIterator[AnswerHead | bytes]:
        headers = [(b"content-type", b"text/event-stream"), (b"x-qnext-replica", self._name)]
        yield AnswerHead(200, headers, EVENT, False)
        for _ in range(orjson.loads(call.body)["max_tokens"] - 1):
            await asyncio.sleep(_SECONDS)
            yield EVENT
        yield b"data: [DONE]\n\n"


def app(given: Mapping[str, Any]) -> serve.Application:
    """As deploy/ray_serve.py, whose model is not looked at."""
    return application(given, Parrot)
