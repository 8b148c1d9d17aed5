"""What `serve` makes of its flags, and prints: its log, and the line that says that it is ready."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from qnext.server.app import Server
    from qnext.server.keys import KeyRing
    from qnext.server.limits import Limits
    from qnext.server.run import Urls


def log_to_stderr(form: Literal["text", "json"], *, secrets: Iterable[str] = ()) -> None:
    """One line per record on stderr, as text or JSON; keys are blacked out."""
    from qnext.server.audit import RedactingFilter

    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(text if form == "text" else _json_formatter())
    handler.addFilter(RedactingFilter(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # Uvicorn tells of every start and stop; its errors stay.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _json_formatter() -> logging.Formatter:
    import structlog

    before: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    after: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=after)


class Face(NamedTuple):
    """What a server shows of itself, and to which pages and under which names."""

    with_page: bool
    open_readiness: bool
    origins: Sequence[str]
    allowed_hosts: Sequence[str]
    metrics_compat: Literal["vllm"] | None


def new_server(keys: KeyRing, limits: Limits, face: Face, audit_log: Path | None, audit_chain: bool) -> Server:
    """The server that the flags describe. Raises OSError where the audit log cannot be written."""
    from qnext.server.app import Server
    from qnext.server.audit import AuditLog

    audit = None if audit_log is None else AuditLog(audit_log, chain=audit_chain)
    return Server(keys=keys, limits=limits, audit=audit, **face._asdict())


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
