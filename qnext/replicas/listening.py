"""An address of the ingress itself, beside Ray Serve's proxy: one hop less, with the bounds of `qnext serve`.

Slow clients, large heads and other bytes than HTTP are refused as `http/protocol.py` does.
"""

from __future__ import annotations

import asyncio
import time

from qnext.replicas.ingress import Ingress
from qnext.server.run import Listen, listener, open_socket
from qnext.server.server import Server

_LOOK_SECONDS = 0.05


class OwnListener:
    """It belongs to the event loop in which it is started. `server` has no model; its limits bound connections."""

    def __init__(self, ingress: Ingress, server: Server, listen: Listen) -> None:
        """Raises UsageError where the address is not available."""
        self._ingress = ingress
        self._server = server
        self._socket = open_socket(listen, server.limits)
        self._listener = listener(ingress, server, listen)
        self._running: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        self._running = asyncio.create_task(self._listener.serve([self._socket]))

    async def stop(self) -> None:
        """Listen no more. Requests that run have `drain_seconds` to end."""
        if self._running is not None and self._listener.started:
            for accepting in self._listener.servers:
                accepting.close()
            end = time.monotonic() + self._server.limits.drain_seconds
            while self._ingress.num_running and time.monotonic() < end:
                await asyncio.sleep(_LOOK_SECONDS)
            self._listener.should_exit = True
            await self._running
        self._socket.close()
        self._server.close()
