"""A server on two ranks: the answers of a server in one process, and its end when a rank is killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx2

from tests.cli.test_ranks import children, is_running
from tests.server.process import process
from tests.server.serving import running_server
from tests.server.test_process import LONG, start_streams

SHARED = "All work and no play makes Jack a dull boy. " * 8


def ask(client: httpx2.Client, end: str) -> dict[str, Any]:
    body = {"prompt": SHARED + end, "max_tokens": 24, "temperature": 1.0, "seed": 5, "ignore_eos": True, "logprobs": 2}
    answer: dict[str, Any] = client.post("/v1/completions", json=body).json()
    return answer


def test_a_server_on_ranks(chat_model: Path) -> None:
    """Cached prefixes and drafts included. A killed rank ends running answers with an error, and the server with a
    line."""
    with running_server(chat_model) as one, one.client() as client:
        alone = [ask(client, end) for end in ("So", "Now", "So")]
    with process(chat_model, "--tensor-parallel", "2") as one:
        ranks = children(one.popen.pid)
        with one.client() as client:
            found = [ask(client, end) for end in ("So", "Now", "So")]
        for mine, theirs in zip(found, alone, strict=True):
            assert (mine["choices"], mine["usage"]) == (theirs["choices"], theirs["usage"])
        assert found[2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        streams, threads = start_streams(one, 2, LONG)
        os.kill(ranks[0], signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert one.wait(30) == 7
    for lines in streams:
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "unavailable"
        assert all(json.loads(event)["choices"][0]["finish_reason"] is None for event in events[:-2])
    assert one.lines[-1] == "qnext serve: rank 1 was lost: signal 9 ended it\n"
    assert sum("lost" in line for line in one.lines) == 1 and len(one.lines) == 6, "".join(one.lines)
    assert not any(map(is_running, ranks))
