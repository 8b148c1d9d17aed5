"""Every bound of the server in one place; docs/guide/limits.md is this table for readers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

# Bounds of a body's shape, the same for every server.
MAX_JSON_DEPTH = 64
MAX_JSON_CONTAINERS = 100_000  # objects and lists of a body
MAX_JSON_MEMBERS = 65_536  # of its objects
MAX_JSON_VALUES = 300_000  # and what lists and objects hold
MAX_MESSAGES = 4_096
MAX_CONTENT_PARTS = 1_024
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LISTED_TOKENS = 1_024  # logit_bias, stop_token_ids, allowed_token_ids
MAX_BAD_WORDS = 64
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128  # of one message
MAX_TEMPLATE_ARGUMENTS = 64  # of chat_template_kwargs
MAX_NAME_CHARACTERS = 128  # of a tool
MAX_TEXT_PER_TOKEN = 8  # characters of a prompt per token of the context, beyond which it is not tokenized whole
MAX_PROMPT_LOGPROB_TOKENS = 32_768
MAX_LOGPROBS = 20
MAX_HELD_BYTES = 128 << 20  # of all bodies that are read or worked on
MAX_HELD_BYTES_PER_KEY = 64 << 20  # of those of one key, or address where there are no keys
MAX_LARGE_WAITING = 64  # requests with large bodies of one key, or address, that wait for their turn
MAX_ERROR_BYTES = 4_096
MAX_ERROR_MESSAGE = 500  # characters


@dataclass(frozen=True)
class Limits:
    """The limits of a server that its operator may change. Times are in seconds."""

    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    max_n: int = 16
    max_queued: int = 512  # sequences that wait, of all keys
    max_queued_per_key: int = 64
    max_connections: int = 2_048
    header_seconds: float = 15.0  # for a request's headers to come
    body_seconds: float = 30.0  # and its body
    queue_seconds: float = 60.0  # until its first step
    request_seconds: float = 600.0  # until its end
    park_seconds: float = 2.0  # a client that reads nothing, until its request gives up its place
    write_seconds: float = 60.0  # and until it is ended
    ping_seconds: float = 10.0  # without a byte in a stream; some clients give up after 15
    drain_seconds: float = 30.0  # for running requests when the server is told to stop
    watchdog_seconds: float = 300.0  # for one step of the model
    retry_seconds: int = 2  # what Retry-After says when the server is full
