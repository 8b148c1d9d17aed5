"""Listeners, signals, drain and watchdog: the life of a server from its first byte to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import uvicorn

from qnext.errors import UsageError
from qnext.server import heap
from qnext.server.admin import ADMIN_ROUTES
from qnext.server.expert_watch import keep_watching
from qnext.server.http.application import make_application
from qnext.server.http.protocol import protocol_of
from qnext.server.server import Server
from qnext.server.table import public_routes

if TYPE_CHECKING:
    from qnext.engine import Engine
    from qnext.server.inference.served import ServedModel
    from qnext.server.limits import Limits

_log = logging.getLogger("qnext.server")
# The engine's thread gives the interpreter up this soon for whoever waits: tokens leave within a fraction of a step.
_SWITCH_SECONDS = 0.0005
_JANITOR_SECONDS = 0.25
_FAULTS = 8  # looks of the janitor that must find one
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 1024
_SILENT_SECONDS = 60  # without a byte, until the system asks whether a client is still there
_PROBES = 4  # such questions, fifteen seconds apart, without an answer end a connection
_PROBE_SECONDS = 15
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
EXIT_HUNG = 70  # a step of the model does not end, or the engine has failed: the supervisor should start anew


@dataclass(frozen=True)
class Listen:
    """The address of a listener: host and port, or a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    admin_port: int | None = None  # on the loopback interface
    certificate: str | None = None  # PEM files
    certificate_key: str | None = None


def port_or_any(port: int) -> int:
    """The port, or 0 for any where it is taken on the loopback interface."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port


class Urls(NamedTuple):
    """The addresses at which a server answers."""

    public: str
    admin: str | None
    elsewhere: str | None = None  # for other machines, where all interfaces are listened on


class _Uvicorn(uvicorn.Server):
    """uvicorn that leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


LoadModel = Callable[[], "tuple[Engine, ServedModel]"]
OnReady = Callable[[Server, Urls], None]


def serve(server_of: Callable[[], Server], load: LoadModel, listen: Listen, *, on_ready: OnReady) -> None:
    """Serve until SIGTERM or SIGINT. The listener opens first and answers 503 while `load` runs.

    Raises what `load` raises, and UsageError where the address is not available.
    """
    prepare_process()

    def freeze(server: Server, urls: Urls) -> None:
        gc.freeze()  # weights and vocabulary stay: no collection need look at them again
        on_ready(server, urls)

    async def main() -> None:
        server = server_of()
        _handle_signals(server)
        await _serve(server, load, listen, freeze)

    asyncio.run(main())


def prepare_process() -> None:
    """Settings of the whole process, for one that serves a model and does nothing else."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    heap.bound_arenas()


def look_after(server: Server) -> list[asyncio.Task[None]]:
    """Tasks that run as long as a server does: its janitor, and what gives freed memory back."""
    return [
        asyncio.create_task(janitor(server)),
        asyncio.create_task(heap.keep_trimmed(lambda: bool(server.active))),
    ]


@contextlib.contextmanager
def serving(server_of: Callable[[], Server], load: LoadModel, listen: Listen) -> Iterator[tuple[Server, Urls]]:
    """A server in its own thread while the context lasts. It is drained at the end. Raises as `serve` does."""
    found: queue.SimpleQueue[tuple[Server, Urls] | BaseException] = queue.SimpleQueue()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await _serve(server_of(), load, listen, lambda *ready: found.put(ready))

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found.put(error)

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    ready = found.get()
    if isinstance(ready, BaseException):
        raise ready
    try:
        yield ready
    finally:
        with contextlib.suppress(RuntimeError):  # it has stopped by itself
            loops[0].call_soon_threadsafe(ready[0].request_stop)
        thread.join()


async def _serve(server: Server, load: LoadModel, listen: Listen, on_ready: OnReady) -> None:
    sockets = [open_socket(listen, server.limits)]
    routes = public_routes(with_page=server.with_page, open_readiness=server.open_readiness)
    bound = listen.host if listen.uds is None else None
    listeners = [listener(make_application(server, routes, bound=bound), server, listen)]
    if listen.admin_port is not None:
        sockets.append(open_socket(Listen("127.0.0.1", listen.admin_port), server.limits))
        listeners.append(listener(make_application(server, ADMIN_ROUTES), server, Listen()))
    runs = [asyncio.create_task(one.serve([sock])) for one, sock in zip(listeners, sockets, strict=True)]
    cleaning = look_after(server)
    try:
        engine, served = await _loaded(server, load)
        server.attach(engine, served)
        admin = _url(Listen(), sockets[-1]) if len(sockets) > 1 else None
        urls = Urls(_url(listen, sockets[0]), admin, _url_elsewhere(listen, sockets[0]))
        on_ready(server, urls)
        if server.expert_watch is not None:
            cleaning.append(asyncio.create_task(keep_watching(server.expert_watch, lambda: engine.expert_counts(0))))
        await server.stop_wanted.wait()
        await server.drain(server.limits.drain_seconds)
    finally:
        for one in listeners:
            one.should_exit = True
        await asyncio.gather(*runs)
        for task in cleaning:
            task.cancel()
        server.close()
    if server.lost is not None:
        raise server.lost


async def _loaded(server: Server, load: LoadModel) -> tuple[Engine, ServedModel]:
    """What `load` gives. The process ends here when it is told to stop before that."""
    loading = asyncio.ensure_future(asyncio.to_thread(load))
    stopping = asyncio.ensure_future(server.stop_wanted.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # A thread cannot be ended; nothing is lost by leaving it behind.
        _log.warning("stopped while loading")
        sys.stderr.flush()
        os._exit(0)
    stopping.cancel()
    return loading.result()


def listener(application: Any, server: Server, listen: Listen) -> uvicorn.Server:
    """A uvicorn server for one application. The caller gives it its socket."""
    config = uvicorn.Config(
        application,
        http=protocol_of(server),
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=3,
        ssl_certfile=listen.certificate,
        ssl_keyfile=listen.certificate_key,
    )
    return _Uvicorn(config)


def open_socket(listen: Listen, limits: Limits) -> socket.socket:
    """A bound socket. Raises UsageError where the address is not available."""
    try:
        if listen.uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(listen.uds)
            one = socket.socket(socket.AF_UNIX)
            one.bind(listen.uds)
            os.chmod(listen.uds, 0o600)
        else:
            family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
            # asyncio sends small writes at once (TCP_NODELAY) where a socket is made with its protocol alone.
            one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _notice_the_gone(one, limits.write_seconds)
            one.bind((listen.host, listen.port))
    except OSError as error:
        where = listen.uds or f"{listen.host}:{listen.port}"
        hint = "; another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE and listen.uds is None else ""
        raise UsageError(f"cannot listen on {where}: {error.strerror or error}{hint}") from None
    one.setblocking(False)
    return one


def _notice_the_gone(one: socket.socket, write_seconds: float) -> None:
    """Have the system end accepted connections whose client vanished, as a machine does without power.

    An idle connection is probed. One with unread bytes ends after `write_seconds`, and later than the server's own
    timeout: that one names the reason in the audit log.
    """
    options = {
        "TCP_KEEPIDLE": _SILENT_SECONDS,
        "TCP_KEEPINTVL": _PROBE_SECONDS,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": int(1000 * (write_seconds + 5.0)),
    }
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):  # accepted sockets inherit them; a system that has none keeps its own
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _url(listen: Listen, one: socket.socket) -> str:
    """An address that a browser on this machine can open, which "0.0.0.0" is not."""
    if listen.uds is not None:
        return f"unix:{listen.uds}"
    host, port = one.getsockname()[:2]
    host = _LOOPBACK_OF.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if listen.certificate else 'http'}://{shown}:{port}"


def _url_elsewhere(listen: Listen, one: socket.socket) -> str | None:
    if listen.uds is not None or one.getsockname()[0] not in _LOOPBACK_OF:
        return None
    return f"{'https' if listen.certificate else 'http'}://{socket.gethostname()}:{one.getsockname()[1]}"


def _handle_signals(server: Server) -> None:
    """The first SIGTERM or SIGINT drains, the second ends what runs; SIGHUP reads the keys again."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.is_hurried = server.stop_wanted.is_set()
        server.request_stop()

    def reload_keys() -> None:
        problem = server.keys.reload()
        _log.info("keys reloaded" if problem is None else f"keys not reloaded: {problem}")
        if server.audit is not None:
            server.audit.reopen()

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGHUP, reload_keys)


async def janitor(server: Server) -> None:
    """Parks and then ends streams whose client does not read. Measures the lag of the event loop. Ends a process whose
    engine hangs."""
    num_faults = 0
    while True:
        due = time.monotonic() + _JANITOR_SECONDS
        await asyncio.sleep(_JANITOR_SECONDS)
        now = time.monotonic()
        server.counters.observe_event_loop_lag(max(0.0, now - due))
        for exchange, task in list(server.tasks.items()):
            unread = 0.0 if exchange.write_began is None else now - exchange.write_began
            if unread > server.limits.write_seconds:
                exchange.outcome.error_code = "client_too_slow"
                task.cancel()
            elif unread > server.limits.park_seconds:
                exchange.rest(is_parked=True)
        if server.lost is not None and not server.stop_wanted.is_set():
            server.is_hurried = True
            server.request_stop()
        fault = server.fault
        # A process that was stopped for long wakes up with an old heartbeat: the engine's thread gets a moment.
        num_faults = 0 if fault is None else num_faults + 1
        if num_faults >= _FAULTS:
            _log.critical("%s; ending the process", fault)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            sys.stderr.flush()
            os._exit(EXIT_HUNG)
