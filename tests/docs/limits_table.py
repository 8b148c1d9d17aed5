"""Makes docs/guide/limits.md of qnext/server/limits.py: `python -m tests.docs.limits_table` writes it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from qnext.server import limits

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "limits.md"

# field of Limits -> (what it bounds, the flag of `qnext serve` that changes it)
OPERATOR: dict[str, tuple[str, str | None]] = {
    "max_body_bytes": ("bytes of a body", "--max-body-bytes"),
    "max_header_bytes": ("bytes of all headers", None),
    "max_headers": ("headers of a request", None),
    "max_n": ("answers to one request (`n`)", "--max-n"),
    "max_queued": ("answers of all keys that wait for their turn; more get 503", "--max-queued-requests"),
    "max_queued_per_key": ("answers of one key that wait for their turn; more get 429", "--max-queued-per-key"),
    "max_connections": ("connections at once; more get 503", None),
    "header_seconds": ("seconds until the headers of a request have arrived", None),
    "body_seconds": ("seconds until the body of a request has arrived", None),
    "queue_seconds": ("seconds until the first step of a request", "--queue-timeout"),
    "request_seconds": ("seconds until the end of a request", "--request-timeout"),
    "park_seconds": ("seconds that a write waits for a client that reads nothing, before its request is parked", None),
    "write_seconds": ("seconds that such a write waits, before its request is ended", None),
    "ping_seconds": ("seconds without a byte in a stream, before an event keeps it open", None),
    "drain_seconds": (
        "seconds that running requests have to end when the server is told to stop",
        "--shutdown-timeout",
    ),
    "watchdog_seconds": ("seconds of one step, after which the process ends itself", "--watchdog-timeout"),
    "retry_seconds": ("seconds in `Retry-After` when the queue is full", None),
}

# constant -> what it bounds
FIXED: dict[str, str] = {
    "MAX_JSON_DEPTH": "nested levels of a body's JSON",
    "MAX_JSON_CONTAINERS": "objects and lists in a body",
    "MAX_JSON_MEMBERS": "members of all objects in a body",
    "MAX_JSON_VALUES": "values in all lists and objects of a body",
    "MAX_MESSAGES": "messages of a conversation",
    "MAX_CONTENT_PARTS": "parts of a message's content",
    "MAX_PROMPTS": "prompts of one request to `/v1/completions`",
    "MAX_STOPS": "stop texts",
    "MAX_STOP_CHARACTERS": "characters of a stop text",
    "MAX_LISTED_TOKENS": "tokens in `logit_bias`, `stop_token_ids`, `allowed_token_ids`",
    "MAX_BAD_WORDS": "entries of `bad_words`",
    "MAX_TOOLS": "tools of a request",
    "MAX_TOOL_CALLS": "tool calls in one message",
    "MAX_TEMPLATE_ARGUMENTS": "names in `chat_template_kwargs`",
    "MAX_NAME_CHARACTERS": "characters of a tool's name",
    "MAX_TEXT_PER_TOKEN": "characters of a prompt per token of the context; of a longer prompt only a part is counted",
    "MAX_PROMPT_LOGPROB_TOKENS": "tokens of a prompt whose log-probabilities are asked for",
    "MAX_LOGPROBS": "alternatives per token (`top_logprobs`, `logprobs`, `prompt_logprobs`)",
    "MAX_HELD_BYTES": "bytes of all bodies that are being read or processed; more get 503",
    "MAX_HELD_BYTES_PER_KEY": "such bytes of one key, or of one address on a server without keys; more get 429",
    "MAX_LARGE_WAITING": "requests with a large body of one key, or address, that wait for their turn; more get 429",
    "MAX_ERROR_BYTES": "bytes of an error's body",
    "MAX_ERROR_MESSAGE": "characters of an error's message",
}


def fixed_limits() -> dict[str, int]:
    return {name: value for name, value in vars(limits).items() if name.isupper()}


def page() -> str:
    """The whole page. Raises KeyError for a limit that has no description above."""
    operator = [(f.name, f.default, *OPERATOR[f.name]) for f in fields(limits.Limits)]
    rows = [f"| {text} | {_number(value)} | {f'`{flag}`' if flag else ''} |" for _, value, text, flag in operator]
    fixed = [f"| {FIXED[name]} | {_number(value)} |" for name, value in fixed_limits().items()]
    return "\n".join(
        [
            "# Limits",
            "",
            "This page lists the limits of a server. `python -m tests.docs.limits_table` makes both tables from",
            "`qnext/server/limits.py`, and a test compares them. A request that exceeds a limit is refused with a",
            "status of [errors.md](errors.md).",
            "",
            "## Limits with defaults",
            "",
            "| what | default | flag |",
            "|---|---|---|",
            *rows,
            "",
            "A key may have lower limits: requests and tokens per minute, requests at once, tokens of a request",
            "([serve-a-team.md](serve-a-team.md)).",
            "",
            "## Fixed limits",
            "",
            "| what | at most |",
            "|---|---|",
            *fixed,
            "",
        ]
    )


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    assert isinstance(value, int)
    return f"{value:,}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
