"""Several replicas of `qnext serve` behind one address, by Ray Serve: `serve run ray_serve:app model=/models`.

docs/guide/scale-out.md describes the arguments. The flags are those of `qnext serve`, from a file or the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve.config import RequestRouterConfig

from qnext.cli import VERBS, click_command
from qnext.cli.flags.ranks import RankFlags
from qnext.cli.parsing.command import mistake
from qnext.cli.parsing.config_file import apply_environment, read_flags, take_config
from qnext.cli.serve import Prepared, ServeFlags, prepare
from qnext.errors import UsageError
from qnext.replicas.direct import DirectReplicas
from qnext.replicas.ingress import Ingress
from qnext.replicas.listening import OwnListener
from qnext.replicas.prefixes import MAX_HELD_CHUNKS, SPREAD
from qnext.replicas.replica import Replica
from qnext.server.server import Server

# Flags of an own listener. Without --port Ray Serve's proxy listens alone, whose options are its `http_options`.
OF_THE_LISTENER = ("host", "uds", "ssl_certfile", "ssl_keyfile")
_EXTRA_SECONDS = 10.0  # beyond --shutdown-timeout, for last events and the disk cache
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # the servers' audit logs say more
# Ray Serve's work, its router and ours in one event loop: a request need not wake several threads in each process.
_ONE_LOOP = {
    "env_vars": {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
}
_RESTART_SECONDS = 2.0  # between two looks at a replica


class AppArguments(BaseModel):
    """Arguments of the application. `config` is a file of flags for `qnext serve`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    config: str | None = None
    replicas: int | None = Field(default=None, ge=1)  # as many, always
    min_replicas: int = Field(default=1, ge=0)  # or between these
    max_replicas: int | None = Field(default=None, ge=1)
    target_requests: int | None = Field(default=None, ge=1)  # of a replica, running and waiting; more add replicas
    cpus: float = Field(default=1.0, gt=0)  # of a replica; also its threads, where --threads says nothing
    gpus: float = Field(default=0.0, ge=0)
    resource: str | None = None  # one of these of Ray's own resources for each replica, to say which machines have them
    routers: int = Field(default=1, ge=1)
    router_resource: str | None = None  # as resource, for each router
    spread: int = Field(default=SPREAD, ge=0)
    max_chunks: int = Field(default=MAX_HELD_CHUNKS, ge=1)

    @model_validator(mode="after")
    def _one_way_to_count(self) -> AppArguments:
        if (self.replicas is None) == (self.max_replicas is None):
            raise ValueError("give replicas, or max_replicas for as many as the queue needs")
        if self.max_replicas is None and {"min_replicas", "target_requests"} & self.model_fields_set:
            raise ValueError("min_replicas and target_requests belong to max_replicas")
        return self


def flag_values(model: str, config: str | None) -> dict[str, Any]:
    """The values of all flags by parameter name. Raises UsageError for those that have no meaning here."""
    command = click_command("serve")
    arguments, file = take_config("serve", [model] if config is None else [model, "--config", config])
    from_file = {} if file is None else read_flags(file, "serve", command, VERBS)
    apply_environment("serve", command, from_file)
    try:
        context = command.make_context("qnext serve", arguments, default_map=from_file)
    except Exception as error:
        if hasattr(error, "format_message"):
            raise UsageError(mistake(error, "serve")) from None
        raise
    given = {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}
    if "admin_port" in given:
        raise UsageError("--admin-port: replicas have no routes for administrators")
    for each in fields(RankFlags):
        if each.name in given:
            raise UsageError(f"--{each.name.replace('_', '-')}: a replica is one process, and has no ranks")
    for name in given & set(OF_THE_LISTENER):
        if "port" not in given:
            raise UsageError(f"--{name.replace('_', '-')}: needs --port; without it Ray Serve's proxy listens alone")
    return {**context.params, "port": context.params["port"] if "port" in given else None}


def prepared(values: Mapping[str, Any]) -> Prepared:
    """What the flags say. Raises UsageError, also where nobody needs a key: the proxy may be reached from anywhere."""
    prepare(values["model"], ServeFlags.of({**values, "host": "0.0.0.0"}))
    return prepare(values["model"], ServeFlags.of(values))


@serve.deployment
class ModelReplica(Replica):
    """One model."""

    async def __init__(self, values: Mapping[str, Any]) -> None:
        def open_server(name: str) -> Any:
            new_server, load = prepared(values).open(name)
            return new_server(), load

        await self.open(open_server)

    async def __del__(self) -> None:
        """Ray Serve calls it when the requests have ended, or their time has."""
        await self.close()


@serve.deployment
@serve.ingress()
class Router:
    """The address."""

    def __init__(self, values: Mapping[str, Any], replicas: Any) -> None:
        ready = prepared(values)
        ask = DirectReplicas(replicas).ask
        self._ingress = Ingress(ready.keys, ready.limits, replicas, ask)
        self._own = None
        if values["port"] is not None:
            own = Ingress(ready.keys, ready.limits, replicas, ask, is_behind_proxy=False)
            server = Server(keys=ready.keys, limits=ready.limits, with_page=False)
            self._own = OwnListener(own, server, ready.listen)

    async def __serve_build_asgi_app__(self) -> Ingress:
        if self._own is not None:
            self._own.start()
        return self._ingress

    async def __del__(self) -> None:
        if getattr(self, "_own", None) is not None:
            await self._own.stop()

    def check_health(self) -> None:
        self._ingress.reload_keys()


def app(given: dict[str, Any]) -> serve.Application:
    """The application that `serve run` and serve configs name."""
    return application(given, ModelReplica)


def application(given: Mapping[str, Any], deployment: serve.Deployment) -> serve.Application:
    """The same with any deployment in the place of the model's."""
    arguments = AppArguments(**given)
    if arguments.config is not None:
        arguments.config = str(Path(arguments.config).resolve())
    values = flag_values(arguments.model, arguments.config)
    limits, seats = prepared(values).limits, values["max_num_seqs"]
    autoscaling = None
    if arguments.max_replicas is not None:
        autoscaling = {
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.target_requests or seats,
        }
    patience = limits.drain_seconds + _EXTRA_SECONDS
    replicas = deployment.options(
        name="ModelReplica",
        num_replicas=arguments.replicas,
        autoscaling_config=autoscaling,
        # The server has a queue of its own, in which keys take turns: Ray Serve holds nothing back.
        max_ongoing_requests=seats + limits.max_queued + 64,
        graceful_shutdown_timeout_s=patience,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=_RESTART_SECONDS,
        health_check_timeout_s=30.0,
        logging_config=_QUIET,
        ray_actor_options={
            "num_cpus": arguments.cpus,
            "num_gpus": arguments.gpus,
            "runtime_env": _ONE_LOOP,
            "resources": _one_of(arguments.resource),
        },
        request_router_config=RequestRouterConfig(
            request_router_class="qnext.replicas.router.PrefixRouter",
            request_router_kwargs={"max_chunks": arguments.max_chunks, "spread": arguments.spread},
        ),
    ).bind(values)
    return Router.options(
        num_replicas=arguments.routers,
        max_ongoing_requests=limits.max_connections,
        graceful_shutdown_timeout_s=patience,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=_RESTART_SECONDS,
        logging_config=_QUIET,
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": _ONE_LOOP,
            "resources": _one_of(arguments.router_resource),
        },
        max_replicas_per_node=None if values["port"] is None else 1,  # one process has the port
    ).bind(values, replicas)


def _one_of(resource: str | None) -> dict[str, float]:
    """What a process takes of Ray's own resources."""
    return {} if resource is None else {resource: 1}
