"""Makes answers of a random model certain, its prompts visible and its streams fail, in a server of this process."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from qnext.engine.sampling.constraint import Constraint
from qnext.server.errors import ApiError
from qnext.server.inference.generation import Generation, Update
from tests.server.serving import Running


@contextmanager
def scripted(running: Running, text: str) -> Iterator[None]:
    """Every answer is this text: a grammar leaves the model no other. Tags of tools and thoughts are their tokens."""
    names = running.server.served.tokenizer.added_ids
    pattern = "|".join(map(re.escape, names))
    parts = [part for part in re.split(f"({pattern})", text) if part]
    lark = "start: " + " ".join(part if part in names else json.dumps(part) for part in parts)

    async def guide(constraint: Constraint | None, *, param: str, owner: str = "") -> Any:
        return (await running.server.compiled(Constraint("lark", lark), param=param)).new_state()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running.server, "guide", guide)
        yield


@contextmanager
def recorded_prompts(running: Running) -> Iterator[list[str]]:
    """The texts of the prompts that conversations become meanwhile."""
    served = running.server.served
    encode_chat = served.encode_chat
    prompts: list[str] = []

    async def recording(*arguments: Any, **more: Any) -> Any:
        ids, is_thinking = await encode_chat(*arguments, **more)
        prompts.append(served.tokenizer.decode(ids))
        return ids, is_thinking

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "encode_chat", recording)
        yield prompts


@contextmanager
def failing_stream(error: ApiError) -> Iterator[None]:
    """Generations are silent first, then begin, and then fail so."""
    updates = Generation.updates

    async def failing(self: Generation) -> AsyncIterator[list[Update]]:
        yield []
        async for found in updates(self):
            yield found[:1]
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generation, "updates", failing)
        yield


def named_events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream whose frames have names; comments are left out."""
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("\n\n")
    found: list[dict[str, Any]] = []
    for frame in answer.text.removesuffix("\n\n").split("\n\n"):
        if frame.startswith(":"):
            continue
        head, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert head == f"event: {event['type']}"
        found.append(event)
    return found


def is_idle(running: Running, *, seconds: float = 10.0) -> bool:
    """Whether the engine has nothing to do any more, at the latest after so long."""
    engine = running.server.worker.engine
    end = time.monotonic() + seconds
    while engine.has_unfinished and time.monotonic() < end:
        time.sleep(0.01)
    return not engine.has_unfinished
