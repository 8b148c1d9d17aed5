"""`qnext serve`: a model behind the APIs of OpenAI and Anthropic, with its page."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from qnext.cli.flags import serve as flags
from qnext.cli.flags.moderation import ModerationFlags
from qnext.cli.flags.values import Model, Strict
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.text import note
from qnext.errors import UsageError
from qnext.session.folder import open_folder
from qnext.session.served import load_served, name_of

if TYPE_CHECKING:
    from qnext.server.run import Urls
    from qnext.server.server import Server


def command(
    model: Model,
    *,
    network: flags.NetworkFlags,
    access: flags.AccessFlags,
    served: flags.ServedFlags,
    memory: flags.MemoryFlags,
    limits: flags.LimitFlags,
    logs: flags.LogFlags,
    moderation: ModerationFlags,
    strict: Strict = False,
) -> None:
    """Serve MODEL: OpenAI's and Anthropic's APIs, metrics, and a page. SIGTERM ends it without losing an answer."""
    from qnext.server.access.audit import AuditLog
    from qnext.server.entrance import check_access, make_key_ring
    from qnext.server.logs import log_to_stderr
    from qnext.server.run import Listen, serve
    from qnext.server.server import Server

    if served.trust_remote_code:
        raise UsageError("--trust-remote-code: nothing of a model is run as code here, so there is nothing to trust")
    certificate, key = network.ssl_certfile, network.ssl_keyfile
    listen = Listen(network.host, network.port, network.uds, access.admin_port, certificate, key)
    plain, admin = access.api_key or (), access.admin_api_key or ()
    ring = make_key_ring(access.keys, plain=plain, plain_file=access.api_key_file, admin=admin)
    check_access(ring, listen, is_insecure=access.insecure_no_auth)
    log_to_stderr(logs.log_format, secrets=[*plain, *admin, *filter(None, [moderation.moderation_api_key])])
    judging = moderation.config()
    folder = open_folder(model, yarn=served.yarn, expert_memory=served.expert_memory)
    watch = logs.expert_watch(folder.config)
    load = partial(
        load_served,
        folder,
        flags.serve_config(served.served_model_name or [name_of(model)], served, memory),
        note=note,
        progress=byte_progress,
    )

    def new_server() -> Server:
        return Server(
            keys=ring,
            limits=limits.limits(),
            audit=None if logs.audit_log is None else AuditLog(logs.audit_log, chain=logs.audit_chain),
            metrics_compat=logs.metrics_compat,
            origins=network.origins or (),
            allowed_hosts=network.allowed_hosts or (),
            with_page=network.ui,
            open_readiness=access.open_readiness,
            expert_watch=watch,
            moderation=judging,
        )

    serve(new_server, load, listen, on_ready=print_ready)


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
