"""An address of the ingress itself, beside Ray Serve's proxy: one hop less, with the bounds of `qnext serve`.

Slow clients, large heads and other bytes than HTTP are refused as `http/protocol.py` does.
"""

from __future__ import annotations

import asyncio

from qnext.replicas.ingress import Ingress
from qnext.server.run import Listen, listener, open_socket
from qnext.server.server import Server

_END_SECONDS = 5.0


class OwnListener:
    """It belongs to the event loop in which it is started. `server` has no model; its limits bound connections."""

    def __init__(self, ingress: Ingress, server: Server, listen: Listen) -> None:
        """Raises UsageError where the address is not available."""
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
        """Take no more requests; those that run have a moment to end."""
        self._listener.should_exit = True
        if self._running is not None:
            await asyncio.wait((self._running,), timeout=_END_SECONDS)
        self._server.close()
