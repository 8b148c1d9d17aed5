"""`qnext serve`: a model behind the APIs of OpenAI and Anthropic, with its page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from qnext.cli.flags import serve as flags
from qnext.cli.flags.moderation import ModerationFlags
from qnext.cli.flags.ranks import RankFlags
from qnext.cli.flags.values import Model, Strict
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.text import note
from qnext.errors import UsageError
from qnext.session.folder import open_folder
from qnext.session.rank_options import ONE_PROCESS, RankOptions
from qnext.session.served import load_served, name_of

if TYPE_CHECKING:
    from qnext.server.access.keys import KeyRing
    from qnext.server.limits import Limits
    from qnext.server.run import Listen, LoadModel, Urls
    from qnext.server.server import Server


@dataclass(frozen=True)
class ServeFlags:
    """All flags of `qnext serve`, by what they are about."""

    network: flags.NetworkFlags
    access: flags.AccessFlags
    served: flags.ServedFlags
    memory: flags.MemoryFlags
    limits: flags.LimitFlags
    logs: flags.LogFlags
    moderation: ModerationFlags

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ServeFlags:
        """From the values by parameter name, as the command line has them once it is read."""
        groups = get_type_hints(cls)
        return cls(
            **{name: kind(**{each.name: values[each.name] for each in fields(kind)}) for name, kind in groups.items()}
        )


class Prepared(NamedTuple):
    """What the flags say, checked. `open` reads the model's folder, and gives what makes the server and what loads the
    weights.

    A name given to `open` sets the files that this server writes apart from those of others with the same flags.
    """

    keys: KeyRing
    limits: Limits
    listen: Listen
    open: Callable[[str | None], tuple[Callable[[], Server], LoadModel]]


def command(
    model: Model,
    *,
    network: flags.NetworkFlags,
    access: flags.AccessFlags,
    served: flags.ServedFlags,
    memory: flags.MemoryFlags,
    limits: flags.LimitFlags,
    logs: flags.LogFlags,
    ranks: RankFlags,
    moderation: ModerationFlags,
    strict: Strict = False,
) -> None:
    """Serve MODEL: OpenAI's and Anthropic's APIs, metrics, and a page. SIGTERM ends it without losing an answer."""
    from qnext.server.run import serve

    given = ServeFlags(network, access, served, memory, limits, logs, moderation)
    ready = prepare(model, given, ranks.begin(model))
    new_server, load = ready.open(None)
    serve(new_server, load, ready.listen, on_ready=print_ready)


def prepare(model: str, given: ServeFlags, ranks: RankOptions = ONE_PROCESS) -> Prepared:
    """Check who may call, and set up the log. Raises QnextError."""
    from qnext.server.entrance import check_access, make_key_ring
    from qnext.server.logs import log_to_stderr
    from qnext.server.run import Listen

    network, access = given.network, given.access
    if given.served.trust_remote_code:
        raise UsageError("--trust-remote-code: nothing of a model is run as code here, so there is nothing to trust")
    certificate, key = network.ssl_certfile, network.ssl_keyfile
    listen = Listen(network.host, network.port, network.uds, access.admin_port, certificate, key)
    plain, admin = access.api_key or (), access.admin_api_key or ()
    ring = make_key_ring(access.keys, plain=plain, plain_file=access.api_key_file, admin=admin)
    check_access(ring, listen, is_insecure=access.insecure_no_auth)
    secrets = [*plain, *admin, *filter(None, [given.moderation.moderation_api_key])]
    log_to_stderr(given.logs.log_format, secrets=secrets)
    return Prepared(ring, given.limits.limits(), listen, partial(_opened, model, given, ranks, ring))


def _opened(
    model: str, given: ServeFlags, ranks: RankOptions, ring: KeyRing, name: str | None
) -> tuple[Callable[[], Server], LoadModel]:
    from qnext.server.access.audit import AuditLog
    from qnext.server.server import Server

    network, access, served, logs = given.network, given.access, given.served, given.logs
    judging = given.moderation.config()
    folder = open_folder(model, yarn=served.yarn, expert_memory=served.expert_memory, device=served.device)
    watch = logs.expert_watch(folder.config)
    audit_log, memory = logs.audit_log, given.memory
    if name is not None:
        audit_log = audit_log and audit_log.with_name(f"{audit_log.stem}-{name}{audit_log.suffix}")
        memory = replace(memory, disk_cache=memory.disk_cache and memory.disk_cache / name)
    load = partial(
        load_served,
        folder,
        replace(flags.serve_config(served.served_model_name or [name_of(model)], served, memory), ranks=ranks),
        note=note,
        progress=byte_progress,
    )

    def new_server() -> Server:
        return Server(
            keys=ring,
            limits=given.limits.limits(),
            audit=None if audit_log is None else AuditLog(audit_log, chain=logs.audit_chain),
            metrics_compat=logs.metrics_compat,
            origins=network.origins or (),
            allowed_hosts=network.allowed_hosts or (),
            with_page=network.ui,
            open_readiness=access.open_readiness,
            expert_watch=watch,
            moderation=judging,
        )

    return new_server, load


def print_ready(server: Server, urls: Urls) -> None:
    """Where it listens, as whom, and a first request to try."""
    served, url = server.served, urls.public
    auth = "no key needed" if server.keys.is_open else "keys needed"
    kind = "chat/completions" if served.chat_format is not None else "completions"
    body = (
        '{"messages":[{"role":"user","content":"Hello"}]}'
        if served.chat_format is not None
        else '{"prompt":"def main(","max_tokens":64}'
    )
    header = "" if server.keys.is_open else " -H 'Authorization: Bearer KEY'"
    lines = [
        f"ready: {url}  model {served.name}, context {served.max_model_len:,}, {auth}"
        + (f", page at {url}/" if server.with_page else ""),
        f"try:   curl {url}/v1/{kind} -H 'Content-Type: application/json'{header} -d '{body}'",
    ]
    if urls.elsewhere is not None:
        lines.insert(1, f"from other machines: {urls.elsewhere}")
    print("\n".join(lines), file=sys.stderr, flush=True)
