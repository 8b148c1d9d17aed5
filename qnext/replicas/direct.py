"""Calls of replicas at their own doors: Ray Serve chooses the replica, and no byte of call or answer passes Ray."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NamedTuple

from qnext.replicas.call import AnswerHead, RoutedCall
from qnext.replicas.wire import NumberedCall, Refused, call_bytes, read_piece

_MAX_IDLE = 64  # connections to one replica that are kept
_LONG_SECONDS = 0.1  # from then on Ray Serve counts a call as running, which costs as much as a call through Ray


class Pick(NamedTuple):
    """What a replica is chosen by: the beginning of a request, how many each has, and who is known to be gone."""

    chain: tuple[bytes, ...]
    loads: Mapping[str, int]
    gone: frozenset[str] = frozenset()


class Hold(NamedTuple):
    """A call that runs at the door of `replica`, for Ray Serve to count."""

    replica: str
    number: int


class ReplicaLost(Exception):
    """The replica has ended with the call."""


class _DoorConnection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class DirectReplicas:
    """The replicas behind Ray Serve's handle of the deployment. It belongs to one event loop.

    A call that lasts is held in Ray Serve, whose autoscaling and whose ends of replicas count what runs.
    """

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas
        self._holds = replicas.options(method_name="hold")
        self._loads: Counter[str] = Counter()
        self._idle: dict[str, list[_DoorConnection]] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def ask(self, call: RoutedCall) -> AsyncGenerator[AnswerHead | bytes, None]:
        """The pieces of the answer; leaving early ends the call. Waits where there is no replica.

        Raises ReplicaLost, ReplicaFailed, and Ray's errors of choosing.
        """
        numbered = NumberedCall(secrets.randbits(64), call)
        gone: set[str] = set()
        while True:
            name, address = await self._choose(call, gone)
            self._loads[name] += 1
            connection: _DoorConnection | None = None
            is_whole = False
            try:
                connection, piece = await self._begin(name, address, numbered)
                holding = asyncio.get_running_loop().call_later(_LONG_SECONDS, self._hold, Hold(name, numbered.number))
                try:
                    while piece is not None:
                        yield piece
                        piece = await read_piece(connection.reader)
                finally:
                    holding.cancel()
                is_whole = True
                return
            except Refused:
                gone.add(name)
                self._forget(name)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                self._forget(name)
                raise ReplicaLost(name) from error
            finally:
                self._release(name, connection, is_whole=is_whole)

    async def _choose(self, call: RoutedCall, gone: set[str]) -> tuple[str, Mapping[str, Any]]:
        """Without a reservation, which would be a call through Ray: the server in the replica has its own queue."""
        pick = Pick(call.chain, dict(self._loads), frozenset(gone))
        async with self._replicas.choose_replica(pick, _reserve=False) as chosen:
            return chosen.replica_id, chosen.replica_metadata

    async def _begin(
        self, name: str, address: Mapping[str, Any], numbered: NumberedCall
    ) -> tuple[_DoorConnection, AnswerHead | bytes | None]:
        """The connection and the first piece. Raises Refused where the replica cannot have begun."""
        idle = self._idle.get(name)
        if idle:
            connection = idle.pop()
        else:
            try:
                connection = _DoorConnection(*await asyncio.open_connection(address["host"], address["port"]))
            except OSError as error:
                raise Refused from error
            connection.writer.write(bytes.fromhex(address["token"]))
        try:
            connection.writer.write(call_bytes(numbered))
            await connection.writer.drain()
            return connection, await read_piece(connection.reader)
        except BaseException:
            connection.writer.close()
            raise

    def _release(self, name: str, connection: _DoorConnection | None, *, is_whole: bool) -> None:
        self._loads[name] -= 1
        if not self._loads[name]:
            del self._loads[name]
        if connection is None:
            return
        kept = self._idle.setdefault(name, [])
        if is_whole and len(kept) < _MAX_IDLE:
            kept.append(connection)
        else:
            connection.writer.close()

    def _forget(self, name: str) -> None:
        for connection in self._idle.pop(name, ()):
            connection.writer.close()

    def _hold(self, hold: Hold) -> None:
        task = asyncio.ensure_future(self._held(hold))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _held(self, hold: Hold) -> None:
        """What becomes of a replica is known at its door."""
        try:
            await self._holds.remote(hold)
        except Exception:
            self._forget(hold.replica)
