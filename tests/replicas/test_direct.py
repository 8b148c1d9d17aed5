"""Calls at the doors of replicas, without Ray's processes: pieces, leaving, ends, and who is asked instead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra ray is not here")

from qnext.replicas.call import AnswerHead, RoutedCall
from qnext.replicas.direct import DirectReplicas, Hold, Pick, ReplicaLost
from qnext.replicas.door import Door
from qnext.replicas.router import PrefixRouter
from qnext.replicas.wire import NumberedCall, ReplicaFailed, call_bytes, read_piece

SCOPE = {
    "type": "http",
    "path": "/v1/completions",
    "raw_path": b"/v1/completions",
    "query_string": b"a=%C3%A4",
    "client": ("10.0.0.1", 7),
    "headers": [(b"x-name", b"\xe4\x00")],
}
HEAD = AnswerHead(200, [(b"content-type", b"text/event-stream"), (b"x", b"\xff")], b"first", False)


class Handle:
    """What Ray Serve's handle does: it routes, and holds."""

    def __init__(self, doors: dict[str, Door]) -> None:
        self.doors, self.holds = doors, list[Hold]()
        self.router = PrefixRouter.__new__(PrefixRouter)
        self.router.initialize_state()

    def options(self, *, method_name: str) -> Handle:
        assert method_name == "hold"
        return self

    async def remote(self, hold: Hold) -> None:
        self.holds.append(hold)
        await self.doors[hold.replica].ended(hold.number)

    @asynccontextmanager
    async def choose_replica(self, pick: Pick, *, _reserve: bool) -> AsyncIterator[Any]:
        assert not _reserve
        replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in self.doors]
        pending: Any = SimpleNamespace(args=[pick], routing_context=SimpleNamespace())
        ((first,), *_) = await self.router.choose_replicas(replicas, pending)
        name = first.replica_id.unique_id
        yield SimpleNamespace(replica_id=name, replica_metadata=self.doors[name].address)


def with_doors(
    answer: Callable[[str, RoutedCall], AsyncGenerator[Any, None]],
    use: Callable[[DirectReplicas, Handle], Awaitable[Any]],
) -> Any:
    async def run() -> Any:
        doors = {name: Door(lambda call, name=name: answer(name, call)) for name in "ab"}
        for door in doors.values():
            await door.open("127.0.0.1")
        handle = Handle(doors)
        try:
            return await asyncio.wait_for(use(DirectReplicas(handle), handle), 30)
        finally:
            for door in doors.values():
                await door.close(0.0)

    return asyncio.run(run())


async def pieces_of(direct: DirectReplicas, body: bytes = b"", *chain: bytes) -> list[AnswerHead | bytes]:
    return [piece async for piece in direct.ask(RoutedCall(SCOPE, body, chain))]


async def echo(name: str, call: RoutedCall) -> AsyncGenerator[Any, None]:
    assert call.scope == SCOPE
    yield HEAD
    yield name.encode()
    yield call.body


def test_a_call_and_its_pieces_arrive_as_they_are() -> None:
    """Several on one connection; a conversation stays with its replica, and another one goes to the other."""

    async def use(direct: DirectReplicas, handle: Handle) -> None:
        body = bytes(range(256)) * 5_000
        head, home, *rest = await pieces_of(direct, body, b"one")
        assert head == HEAD and b"".join(rest) == body  # type: ignore[arg-type]
        assert [await pieces_of(direct, b"x", b"one", b"two") for _ in range(300)] == [[HEAD, home, b"x"]] * 300
        busy = direct.ask(RoutedCall(SCOPE, b"", (b"one",)))
        async with aclosing(busy):
            await anext(busy)
            assert (await pieces_of(direct, b"", b"another"))[1] != home
        assert not handle.holds, "short calls are not counted"

    with_doors(echo, use)


def test_bytes_behind_an_answer_are_the_next_call() -> None:
    """Though they come in the moment in which the replica has written the end, and not yet looked."""

    async def use(direct: DirectReplicas, handle: Handle) -> None:
        address = handle.doors["a"].address
        reader, writer = await asyncio.open_connection(address["host"], address["port"])
        calls = [call_bytes(NumberedCall(n, RoutedCall(SCOPE, b"%d" % n))) for n in range(50)]
        writer.write(bytes.fromhex(address["token"]) + b"".join(calls))
        for n in range(50):
            assert [await read_piece(reader) for _ in range(4)] == [HEAD, b"a", b"%d" % n, None]
        writer.close()

    with_doors(echo, use)


def test_what_is_held_elsewhere_is_waited_for_and_not_asked_again_at_once() -> None:
    router = PrefixRouter.__new__(PrefixRouter)
    router.initialize_state()
    for asked in (Hold("gone", 1), Pick((), {}, frozenset("a"))):
        pending: Any = SimpleNamespace(args=[asked], routing_context=SimpleNamespace(should_backoff=False))
        replicas: Any = [SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"))]
        assert asyncio.run(router.choose_replicas(replicas, pending)) == []
        assert pending.routing_context.should_backoff


def test_leaving_ends_the_call_and_what_lasts_is_held() -> None:
    ended: list[str] = []

    async def endless(name: str, call: RoutedCall) -> AsyncGenerator[Any, None]:
        try:
            yield HEAD
            while True:
                await asyncio.sleep(0.01)
                yield b"."
        finally:
            ended.append(name)

    async def use(direct: DirectReplicas, handle: Handle) -> None:
        async with aclosing(direct.ask(RoutedCall(SCOPE, b""))) as pieces:
            async for _ in pieces:
                if handle.holds:
                    break
            (hold,) = handle.holds
            still = asyncio.ensure_future(handle.doors[hold.replica].ended(hold.number))
            await asyncio.sleep(0.02)
            assert not still.done() and not ended
        await still
        assert ended == [hold.replica]

    with_doors(endless, use)


def test_a_replica_that_ends_is_passed_over_and_one_that_dies_loses_its_calls() -> None:
    async def slow(name: str, call: RoutedCall) -> AsyncGenerator[Any, None]:
        yield HEAD
        await asyncio.sleep(0.1 if call.body else 60)
        yield name.encode()

    async def use(direct: DirectReplicas, handle: Handle) -> None:
        running = asyncio.ensure_future(pieces_of(direct, b"is whole", b"one"))
        lost = asyncio.ensure_future(pieces_of(direct, b"", b"one"))
        await asyncio.sleep(0.05)
        (home,) = {name for name, door in handle.doors.items() if door._ended}
        await handle.doors[home].close(0.5)
        assert await running == [HEAD, home.encode()]
        with pytest.raises(ReplicaLost):
            await lost
        other = "b" if home == "a" else "a"
        assert await pieces_of(direct, b"x", b"one") == [HEAD, other.encode()]

    with_doors(slow, use)


def test_a_call_that_breaks_and_a_caller_without_the_token() -> None:
    async def breaks(name: str, call: RoutedCall) -> AsyncGenerator[Any, None]:
        yield HEAD
        raise RuntimeError("x")

    async def use(direct: DirectReplicas, handle: Handle) -> None:
        with pytest.raises(ReplicaFailed):
            await pieces_of(direct)
        address = handle.doors["a"].address
        reader, writer = await asyncio.open_connection(address["host"], address["port"])
        writer.write(b"0" * 32 + b"anything")
        assert await reader.read() == b""
        writer.close()

    with_doors(breaks, use)
