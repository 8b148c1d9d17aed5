"""The log of a server's process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, Literal

from qnext.server.access.audit import RedactingFilter


def log_to_stderr(form: Literal["text", "json"], *, secrets: Iterable[str] = ()) -> None:
    """One line per record on stderr, as text or JSON; keys are blacked out."""
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
        structlog.stdlib.ExtraAdder(allow=["expert_alert"]),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    after: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=after)
