"""The operator's hook before and after every answer: all surfaces, streamed and whole, failures, and what is logged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qnext.server.access.audit import AuditLog
from qnext.server.moderation.hooks import CallableHook, HttpHook
from qnext.server.moderation.judgement import ModerationQuestion
from qnext.server.moderation.moderator import ModerationConfig, OnFailure
from tests.server.moderators import BODIES, Script, delta_of, end_of, events, http_service, post, text_of
from tests.server.serving import Running, running_server

SURFACES = list(BODIES)


@contextmanager
def moderated(
    folder: Path, script: Script, *, on_failure: OnFailure = "block", seconds: float = 30.0, **options: Any
) -> Iterator[Running]:
    config = ModerationConfig(CallableHook(script.plain), seconds, on_failure)
    with running_server(folder, moderation=config, **options) as running:
        yield running


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def kept(chat_model: Path, script: Script, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    audit = tmp_path_factory.mktemp("audit") / "log"
    with moderated(chat_model, script, audit=AuditLog(audit)) as running:
        yield running


@pytest.fixture(autouse=True)
def renewed(script: Script) -> None:
    script.replies.clear()
    script.asked.clear()
    script.seconds = 0.0


BLOCKED = {
    "/v1/chat/completions": "content_filter",
    "/v1/completions": "content_filter",
    "/v1/responses": "content_filter",
    "/v1/messages": "refusal",
}


@pytest.mark.parametrize("path", SURFACES)
def test_what_is_allowed_is_as_without_moderation(kept: Running, server: Running, script: Script, path: str) -> None:
    """Whole and streamed: the same text and end, and the pieces together are all of it."""
    plain, whole = post(server, path), post(kept, path)
    assert (text_of(path, whole), end_of(path, whole)) == (text_of(path, plain), end_of(path, plain))
    (question,) = script.of("answer")
    assert (question["is_last"], question["previous"], "".join(question["input"])) == (True, "", text_of(path, plain))
    script.asked.clear()
    streamed = post(kept, path, stream=True)
    assert (text_of(path, streamed), end_of(path, streamed)) == (text_of(path, plain), end_of(path, plain))
    pieces = script.of("answer")
    assert [piece["is_last"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 1 or len(text_of(path, plain)) < 240
    (prompt,) = script.of("prompt")
    assert any("Say something" in text for text in prompt["input"])
    assert prompt["request_id"] == streamed.headers["x-request-id"] and prompt["model"] == "tiny-chat"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", SURFACES)
def test_a_prompt_that_is_blocked(kept: Running, script: Script, path: str, stream: bool) -> None:
    script.replies["prompt"] = {"results": [{"flagged": True, "categories": {"violence": True, "hate": False}}]}
    steps = kept.server.worker.engine.metrics.num_requests
    answer = post(kept, path, stream=stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "refused by the moderation" in error["message"] and "Say" not in answer.text
    assert error.get("code", "content_filter") == "content_filter"
    assert script.of("answer") == [] and kept.server.worker.engine.metrics.num_requests == steps
    record = record_of(kept, answer)
    assert (record["moderation"], record["categories"], record["error_code"]) == (
        "blocked",
        ["violence"],
        "content_filter",
    )


@pytest.mark.parametrize("path", SURFACES)
def test_an_answer_that_is_blocked(kept: Running, script: Script, path: str) -> None:
    """Of a whole answer nothing is sent; of a stream what was judged before. The engine stops."""
    script.replies["answer"] = {"action": "block", "categories": ["pii"]}
    whole = post(kept, path)
    assert whole.status_code == 200
    assert (text_of(path, whole), end_of(path, whole)) == ("", BLOCKED[path])
    record = record_of(kept, whole)
    assert (record["moderation"], record["categories"], record["finish_reason"]) == (
        "blocked",
        ["pii"],
        "content_filter",
    )
    script.replies["answer"] = lambda question: "block" if question["previous"] else "allow"
    streamed = post(kept, path, stream=True)
    sent, pieces = text_of(path, streamed), script.of("answer")[1:]
    if len(pieces) == 1:
        return  # a short answer has one piece
    assert end_of(path, streamed) == BLOCKED[path]
    assert sent and sent == pieces[1]["previous"]
    assert "".join(pieces[0]["input"]).startswith(sent) and not pieces[1]["input"][0].startswith(sent)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", SURFACES)
def test_texts_that_are_replaced(kept: Running, script: Script, path: str, stream: bool) -> None:
    script.replies["prompt"] = lambda question: {
        "action": "redact",
        "texts": [text.replace("something", "[REDACTED]") for text in question["input"]],
    }
    script.replies["answer"] = lambda question: {"action": "redact", "texts": ["<gone>"] * len(question["input"])}
    answer = post(kept, path, stream=stream)
    assert set(text_of(path, answer).split("<gone>")) == {""}
    assert text_of(path, answer) != ""
    assert record_of(kept, answer)["moderation"] == "redacted"


def record_of(running: Running, answer: httpx2.Response) -> dict[str, Any]:
    """The line of the audit log, which is written when the request has ended: a moment after its answer."""
    assert running.server.audit is not None
    while True:
        for line in running.server.audit.path.read_text().splitlines():
            record: dict[str, Any] = json.loads(line)
            if record["request_id"] == answer.headers["x-request-id"]:
                return record
        time.sleep(0.01)


def test_the_prompt_of_the_model_is_the_redacted_one(kept: Running, script: Script) -> None:
    """What the model reads, not only what is answered: echo shows it; ids come back as text where they change."""
    script.replies["prompt"] = lambda question: {"action": "redact", "texts": ["the secret is ***"]}
    for prompt in ("the secret is 42", list(b"the secret is 42")):
        body = {"model": "alias", "prompt": prompt, "max_tokens": 1, "echo": True, "temperature": 0}
        answer = httpx2.post(f"{kept.url}/v1/completions", json=body, timeout=60.0).json()
        assert answer["choices"][0]["text"].startswith("the secret is ***")
    script.replies["prompt"] = lambda question: {"action": "redact", "texts": [None, "x"]}
    answer = httpx2.post(f"{kept.url}/v1/completions", json={**body, "prompt": "a"}, timeout=60.0)
    assert answer.status_code == 503, "a reply of the wrong number of texts is none"


def test_people_are_asked_to_look(kept: Running, script: Script) -> None:
    """A flag lets the text through, and stands in the audit log without any content."""
    script.replies["answer"] = {"action": "flag", "categories": ["self-harm", "has spaces and 'content'", 3]}
    answer = post(kept, "/v1/completions")
    record = record_of(kept, answer)
    assert text_of("/v1/completions", answer) != ""
    assert (record["flagged"], record["moderation"], record["categories"]) == (True, "flagged", ["self-harm"])
    script.replies["answer"] = {"action": "block", "review": True}
    record = record_of(kept, post(kept, "/v1/completions"))
    assert (record["flagged"], record["moderation"]) == (True, "blocked")
    script.replies.clear()
    record = record_of(kept, post(kept, "/v1/completions"))
    assert (record["flagged"], record["moderation"]) == (False, "allowed")


def test_what_begins_in_one_piece_and_ends_in_the_next(kept: Running, server: Running, script: Script) -> None:
    """A word that two pieces share is seen whole before any of it is sent."""
    text = text_of("/v1/completions", post(server, "/v1/completions"))
    assert len(text) > 300
    for begin in range(220, 245, 4):  # about the end of the first piece
        secret = text[begin : begin + 20]
        script.replies["answer"] = lambda question, secret=secret: (
            "block" if any(secret in text for text in question["input"]) else "allow"
        )
        sent = text_of("/v1/completions", post(kept, "/v1/completions", stream=True))
        assert secret not in sent and not sent.endswith(secret[:12])
        assert text.startswith(sent)


def test_several_answers_are_judged_apart(kept: Running, script: Script) -> None:
    replies = iter(["allow", "block", "allow"])
    script.replies["answer"] = lambda question: next(replies)
    body = {**BODIES["/v1/completions"], "model": "alias", "n": 3, "max_tokens": 20, "temperature": 1, "seed": 1}
    choices = httpx2.post(f"{kept.url}/v1/completions", json=body, timeout=60.0).json()["choices"]
    assert sorted(choice["finish_reason"] for choice in choices) == ["content_filter", "length", "length"]
    assert all((choice["text"] == "") == (choice["finish_reason"] == "content_filter") for choice in choices)


@pytest.mark.parametrize("name", ["logprobs", "return_token_ids"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_tokens_are_not_told(kept: Running, path: str, name: str) -> None:
    value = 1 if path == "/v1/completions" and name == "logprobs" else True
    answer = post(kept, path, **{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


TOOL = {
    "name": "weather",
    "description": "of a city",
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": ["b"]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def arguments_of(answer: httpx2.Response) -> str:
    is_stream = answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text) if is_stream else [answer.json()]
    parts = [choice["delta" if is_stream else "message"] for event in found for choice in event["choices"]]
    return "".join(call["function"]["arguments"] for part in parts for call in part.get("tool_calls") or ())


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_judged_whole(kept: Running, server: Running, script: Script, stream: bool) -> None:
    """A forced call: the same events as without moderation, and the arguments in one piece."""
    more = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required", "max_tokens": 400}
    more |= {"ignore_eos": False, "stream": stream}
    answers = [post(running, "/v1/chat/completions", **more) for running in (server, kept)]
    plain, judged = map(arguments_of, answers)
    assert plain == judged != ""
    kinds = [kind for question in script.of("answer") for kind in question["kinds"]]
    texts = [text for question in script.of("answer") for text in question["input"]]
    assert kinds == ["tool_call"] * len(kinds) and all(json.loads(text) == {"a": "b"} for text in texts)
    assert end_of("/v1/chat/completions", answers[1]) == "tool_calls"


# ---- where it fails ----


def fails(question: Any) -> Any:
    raise RuntimeError("the text of a request")


FAILURES: list[tuple[Any, float, str]] = [
    (fails, 30.0, "error"),
    ("maybe", 30.0, "bad_reply"),
    (lambda question: 1 / 0, 30.0, "error"),
]


@pytest.mark.parametrize("stage", ["prompt", "answer"])
@pytest.mark.parametrize(("reply", "seconds", "reason"), FAILURES)
def test_a_hook_that_fails_blocks(
    kept: Running, script: Script, caplog: pytest.LogCaptureFixture, stage: str, reply: Any, seconds: float, reason: str
) -> None:
    script.replies[stage] = reply
    for path in SURFACES:
        answer = post(kept, path)
        assert answer.status_code == 503, path
        assert "moderation of this server does not answer" in answer.text
    assert record_of(kept, answer)["moderation"] == "failed"
    streamed = post(kept, "/v1/chat/completions", stream=True)
    assert text_of("/v1/chat/completions", streamed) == "" if streamed.status_code == 200 else True
    assert "the text of a request" not in caplog.text
    metrics = httpx2.get(f"{kept.url}/metrics").text
    assert f'qnext_moderation_failures_total{{reason="{reason}",stage="{stage}"}}' in metrics


def test_a_hook_that_fails_may_let_pass(chat_model: Path, script: Script, tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "log")
    with moderated(chat_model, script, on_failure="allow", seconds=0.05, audit=audit) as running:
        script.replies["prompt"] = fails
        for stream in (False, True):
            answer = post(running, "/v1/completions", stream=stream)
            assert answer.status_code == 200 and text_of("/v1/completions", answer)
            assert record_of(running, answer)["moderation"] == "unjudged"
        script.seconds = 1.0
        assert post(running, "/v1/completions", max_tokens=4).status_code == 200
        assert 'reason="timeout"' in httpx2.get(f"{running.url}/metrics").text


def test_a_slow_hook_blocks_nobody(kept: Running, server: Running, script: Script) -> None:
    """While it thinks the server answers others, and nothing of the answer is lost."""
    script.seconds = 0.3
    with httpx2.stream(
        "POST", f"{kept.url}/v1/completions", json={**BODIES["/v1/completions"], "model": "alias", "stream": True}
    ) as stream:
        health = httpx2.get(f"{kept.url}/health", timeout=5.0)
        assert health.status_code == 200
        text = "".join(map(delta_of, events("\n".join(stream.iter_lines()))))
    assert text == text_of("/v1/completions", post(server, "/v1/completions"))
    assert script.of("answer")[-1]["is_last"]


@pytest.mark.parametrize("kind", ["coroutine", "http"])
def test_other_hooks(chat_model: Path, kind: str) -> None:
    script = Script()
    script.replies["answer"] = {"action": "block"}
    with http_service(script, key="k") as url:
        hook = CallableHook(script.coroutine) if kind == "coroutine" else HttpHook(url, "k")
        with running_server(chat_model, moderation=ModerationConfig(hook, 20.0)) as running:
            answer = post(running, "/v1/chat/completions")
            assert end_of("/v1/chat/completions", answer) == "content_filter"
            prompt, question = script.asked
            assert prompt["kinds"] == ["user"] and question["kinds"] == ["content"]
            assert set(prompt) == set(ModerationQuestion("prompt", (), (), "", "").document())
            if kind == "http":
                script.replies["answer"] = b"<html>"
                assert post(running, "/v1/chat/completions").status_code == 503
                script.replies["answer"] = {"results": [{"flagged": False}]}
                assert end_of("/v1/chat/completions", post(running, "/v1/chat/completions")) == "length"
        if kind == "http":
            wrong = ModerationConfig(HttpHook(url, "other"), 20.0)
            with running_server(chat_model, moderation=wrong) as running:
                assert post(running, "/v1/chat/completions").status_code == 503


def test_metrics_and_calls(kept: Running, script: Script) -> None:
    """The time of each stage is counted. A conversation with calls is judged as its texts."""
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    answer = post(kept, "/v1/chat/completions", messages=messages, max_tokens=5)
    assert answer.status_code == 200
    (prompt,) = script.of("prompt")
    assert list(zip(prompt["kinds"], prompt["input"], strict=True)) == [
        ("system", "Be brief"),
        ("user", "Weather?"),
        ("tool_call", '{"city": "Oslo"}'),
        ("tool", "rain"),
    ]
    metrics = httpx2.get(f"{kept.url}/metrics").text
    for stage in ("prompt", "answer"):
        assert f'qnext_moderation_seconds_count{{stage="{stage}"}}' in metrics
        assert f'qnext_moderation_verdicts_total{{action="allow",stage="{stage}"}}' in metrics
