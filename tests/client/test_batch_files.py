"""Lines of a batch: what is a request, and files that answers go to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qnext.client.batch_files import BadLine, BatchOutput, BatchRequest, read_requests
from qnext.errors import UsageError


def line(custom_id: object, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(each) for each in text.splitlines()]


def encoded(*lines: Any) -> list[bytes]:
    return [json.dumps(each).encode() for each in lines]


def test_lines_are_requests_or_say_what_is_wrong() -> None:
    good, streamed, other = line("a"), line("b", stream=True), line("c", url="/v1/embeddings")
    found = list(
        read_requests(
            [
                *encoded(good),
                b"\n",
                b"{",
                *encoded([1], streamed, other, good, line(7), line(""), {**good, "method": "GET"}),
                b'{"custom_id": "x", "method": "POST", "url": "/v1/messages", "body": [NaN]}',
            ]
        )
    )
    assert found[0] == BatchRequest("a", "/v1/completions", good["body"])
    faults = [entry for entry in found[1:] if isinstance(entry, BadLine)]
    assert len(faults) == len(found) - 1
    assert [fault.code for fault in faults] == [
        "invalid_json",
        "invalid_request",
        "invalid_request",
        "invalid_url",
        "duplicate_custom_id",
        "invalid_custom_id",
        "invalid_custom_id",
        "invalid_method",
        "invalid_json",
    ]
    assert faults[0].message.startswith("line 3:") and faults[4].custom_id == "a"


def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("dear diary\n", '{"a": 1}\n', '[]\n{"x', "no end of line"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"notes\.txt: line 1 is no line"):
            BatchOutput(str(path))
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"custom_id": "a", "response": null, "error": {}}\n')
    with BatchOutput(str(path)) as first, pytest.raises(UsageError, match="another run"):
        first.write({"custom_id": "b"})
        BatchOutput(str(path))
    assert read(path) == [{"custom_id": "b"}]
