"""Routes of the administrators' listener, each for keys with the scope admin."""

from __future__ import annotations

import asyncio

from qnext.server.errors import ApiError
from qnext.server.exchange import Exchange
from qnext.server.routes import HttpResponse, Route


async def status(exchange: Exchange) -> HttpResponse:
    """What the server is doing: its state, its requests without their content, and its gauges."""
    server = exchange.server
    requests = [
        {
            "request_id": other.request_id,
            "route": other.route.path,
            "key_id": None if other.key is None else other.key.id,
            "prompt_tokens": other.outcome.prompt_tokens,
            "stream": other.outcome.stream,
        }
        for other in server.active
        if other.route.limit == "generation"
    ]
    worker = None if server.state == "loading" else server.worker
    gauges = None if worker is None else worker.engine.metrics.as_dict()["gauges"]
    owners = {} if worker is None else worker.by_owner()
    keys = [{"key_id": owner or None, **held} for owner, held in owners.items()]
    state = server.fault or server.state
    return HttpResponse.of(
        {"state": state, "degraded": server.losses, "requests": requests, "engine": gauges, "keys": keys}
    )


async def experts(exchange: Exchange) -> HttpResponse:
    """Tokens of every expert of every layer since the start and in the last 64 steps, and what the watch says."""
    engine = exchange.server.worker.engine
    load = await asyncio.to_thread(engine.expert_load, 64)
    if load is None:
        raise ApiError(404, "this model has no experts that are counted", code="not_found")
    watch = exchange.server.expert_watch
    return HttpResponse.of(load.as_dict() | {"watch": None if watch is None else watch.document()})


async def reload_keys(exchange: Exchange) -> HttpResponse:
    """Read the file of keys again; a bad file leaves the keys as they are."""
    problem = exchange.server.keys.reload()
    if problem is not None:
        raise ApiError(409, "the file of keys cannot be read; see the log", code="bad_key_file")
    return HttpResponse.of({"keys": len(exchange.server.keys.keys)})


async def abort(exchange: Exchange) -> HttpResponse:
    """End one request by its id."""
    wanted = exchange.path_params["request_id"]
    headers = {"x-should-retry": "false"}
    error = ApiError(503, "an administrator has ended this request", code="aborted_by_admin", headers=headers)
    for other, task in list(exchange.server.tasks.items()):
        if other.request_id == wanted:
            other.outcome.error_code = error.code
            for generation in other.generations:
                generation.deliver([], error)  # a stream tells its client
            if not other.generations:
                task.cancel()
            return HttpResponse.of({"aborted": True})
    raise ApiError(404, "no such request is running", code="not_found")


async def drain(exchange: Exchange) -> HttpResponse:
    """Take no more requests, let the running ones end, and stop, as SIGTERM does."""
    exchange.server.request_stop()
    return HttpResponse.of({"state": "draining"})


ADMIN_ROUTES = (
    Route("GET", "/admin/status", status, "admin", "probe", "openai", "access", "state and running requests"),
    Route("GET", "/admin/experts", experts, "admin", "light", "openai", "access", "load of every expert"),
    Route("POST", "/admin/keys/reload", reload_keys, "admin", "probe", "openai", "access", "read the keys again"),
    Route("POST", "/admin/requests/{request_id}/abort", abort, "admin", "probe", "openai", "access", "end a request"),
    Route("POST", "/admin/drain", drain, "admin", "probe", "openai", "access", "stop as by SIGTERM"),
)
