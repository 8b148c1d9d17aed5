"""What programs that are not installed here read of answers, checked on the raw bytes."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.server.serving import Running
from tests.server.test_chat import chunks

ASK: dict[str, Any] = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "traffic")
]


def test_no_client_of_these_tests_gets_out() -> None:
    for host in ("192.0.2.1", "2001:db8::1", "api.openai.com"):
        with pytest.raises(AssertionError, match="a test"):
            socket.create_connection((host, 9), timeout=0.1)


def accumulated(deltas: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Calls as Qwen-Agent adds them up: a new id opens one; else name and arguments are appended to the last."""
    calls: list[dict[str, str]] = []
    for delta in deltas:
        for part in delta.get("tool_calls") or []:
            function = part["function"]
            if calls and part.get("id") in (None, "", calls[-1]["id"]):
                calls[-1]["name"] += function.get("name") or ""
                calls[-1]["arguments"] += function.get("arguments") or ""
            else:
                calls.append(
                    {"id": part["id"], "name": function.get("name") or "", "arguments": function.get("arguments") or ""}
                )
    return calls


def by_index(deltas: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Calls as OpenAI's and LiteLLM's clients add them up: by index."""
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for part in delta.get("tool_calls") or []:
            call = calls.setdefault(part["index"], {"id": "", "name": "", "arguments": ""})
            call["id"] = call["id"] or part.get("id") or ""
            for name in ("name", "arguments"):
                call[name] += part["function"].get(name) or ""
    return [calls[index] for index in sorted(calls)]


def test_qwen_agent_and_litellm_see_the_same_calls(server: Running, compact: dict[str, int]) -> None:
    # Behind a call the grammar has a newline and another call, or the end: both unlikely, and so even.
    ends = {str(token): -100 for token in server.server.served.eos_ids}
    body = {
        **ASK,
        "max_tokens": 1_000,
        "tools": TOOLS,
        "tool_choice": "required",
        "stream": True,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "temperature": 1.0,
        "logit_bias": {**compact, **ends},
    }
    most = 0
    with server.client() as client:
        for seed in range(4):
            found = chunks(client.post("/v1/chat/completions", json={**body, "seed": seed}))
            deltas = [chunk["choices"][0]["delta"] for chunk in found if chunk["choices"]]
            calls = accumulated(deltas)
            assert calls and calls == by_index(deltas)
            for call in calls:
                assert call["name"] in ("weather", "traffic")
                assert json.loads(call["arguments"])["city"] in ("Oslo", "Rome")
            assert len({call["id"] for call in calls}) == len(calls)
            most = max(most, len(calls))
    assert most > 1, "some answer made several calls"


def test_thoughts_come_under_both_names_and_first(thinking: Running) -> None:
    end = thinking.server.served.think_end[0]
    body = {
        **ASK,
        "model": None,
        "max_tokens": 300,
        "stream": True,
        "logit_bias": {str(end): 100},
        "guided_choice": ["fine"],
    }
    with thinking.client() as client:
        long = chunks(client.post("/v1/chat/completions", json={**ASK, "model": None, "max_tokens": 8, "stream": True}))
        short = chunks(client.post("/v1/chat/completions", json=body))
    thoughts = [chunk["choices"][0]["delta"] for chunk in long if chunk["choices"]]
    assert any(delta.get("reasoning_content") for delta in thoughts)
    assert all(delta.get("reasoning_content") == delta.get("reasoning") for delta in thoughts)
    content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in short if chunk["choices"])
    assert content == "fine"


# An answer that a client which does its own prompting for tools wants as it is.
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("offered", [False, True])
def test_a_call_without_tools_stays_content(server: Running, stream: bool, offered: bool) -> None:
    body: dict[str, Any] = {**ASK, "max_tokens": 300, "guided_choice": [CALL], "stream": stream}
    if offered:
        body |= {"tools": TOOLS, "parallel_tool_calls": False}
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    if stream:
        found = [chunk["choices"][0] for chunk in chunks(answer) if chunk["choices"]]
        content = "".join(choice["delta"].get("content") or "" for choice in found)
        calls = by_index([choice["delta"] for choice in found])
        reason = found[-1]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        content, reason = choice["message"]["content"] or "", choice["finish_reason"]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
    if offered:
        assert [call["name"] for call in calls] == ["weather"] and content == "" and reason == "tool_calls"
    else:
        assert content == CALL and calls == [] and reason == "stop"


def test_open_webui_finds_the_models_and_ends_its_stream(server: Running) -> None:
    with server.client("anything") as client:
        models = client.get("/v1/models").json()
        assert models["object"] == "list"
        assert [entry["id"] for entry in models["data"]] == ["tiny-chat", "alias"]
        assert all(entry["object"] == "model" and entry["owned_by"] for entry in models["data"])
        # It sends its own bookkeeping along, and messages with fields of other servers.
        body = {
            **ASK,
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
            "metadata": {"chat_id": "1"},
            "chat_id": "1",
            "session_id": "2",
            "background_tasks": {},
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"},
            ],
        }
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert chunks(answer)[-1]["usage"]["completion_tokens"] == 4


def test_aider_is_told_that_an_answer_was_cut(server: Running) -> None:
    """It continues an answer that ended for length, and needs to know a prompt that does not fit from other faults."""
    context = server.server.served.max_model_len
    text = "x" * (context - 60)
    with server.client() as client:
        body = {**ASK, "messages": [{"role": "user", "content": text}], "max_tokens": 4_000, "ignore_eos": True}
        cut = client.post("/v1/chat/completions", json=body).json()
        over = client.post(
            "/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": text + "x" * 60}]}
        )
        turns = [*ASK["messages"], {"role": "assistant", "content": "def "}]
        more = client.post(
            "/v1/chat/completions",
            json={
                **ASK,
                "messages": turns,
                "continue_final_message": True,
                "add_generation_prompt": False,
                "max_tokens": 4,
            },
        )
    assert cut["choices"][0]["finish_reason"] == "length" and cut["usage"]["total_tokens"] == context
    assert over.status_code == 400 and over.json()["error"]["code"] == "context_length_exceeded"
    assert more.status_code == 200 and more.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_load_generators_get_exactly_the_tokens_they_ask_for(server: Running, route: str) -> None:
    prompt: dict[str, Any] = {"messages": ASK["messages"]} if "chat" in route else {"prompt": "x" * 40}
    with server.client() as client:
        # The end is by far the likeliest token, and all the same it does not end the answer.
        end = min(server.server.served.eos_ids)
        for wanted in (1, 2, 33):
            body = {
                **prompt,
                "max_tokens": wanted,
                "ignore_eos": True,
                "stream": True,
                "temperature": 0,
                "logit_bias": {str(end): 50},
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
            found = chunks(client.post(route, json=body))
            used = found[-1]["usage"]
            assert used["completion_tokens"] == wanted and used["total_tokens"] == used["prompt_tokens"] + wanted
            assert found[-2]["choices"][0]["finish_reason"] == "length"
            whole = client.post(route, json={**body, "stream": False, "stream_options": None}).json()
            assert whole["usage"]["completion_tokens"] == wanted
            assert whole["choices"][0]["token_ids"] == [end] * wanted
        ends = client.post(route, json={**prompt, "max_tokens": 9, "logit_bias": {str(end): 100}}).json()
    assert ends["choices"][0]["finish_reason"] == "stop" and ends["usage"]["completion_tokens"] == 1


# What clients send that keep every parameter they know: null is the default, and so is an empty list.
NOTHING = dict.fromkeys(
    [
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "stream_options",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "user",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "reasoning_effort",
        "functions",
        "function_call",
        "metadata",
        "store",
        "service_tier",
        "modalities",
        "prediction",
        "verbosity",
        "top_k",
        "min_p",
        "repetition_penalty",
        "echo",
        "suffix",
        "best_of",
        "extra_body",
        "chat_template_kwargs",
        "structured_outputs",
        "guided_json",
    ]
)


def test_null_is_the_default_of_everything(server: Running) -> None:
    turns = [
        {"role": "user", "content": "Hi", "name": None},
        # An answer as openai-python dumps it.
        {
            "role": "assistant",
            "content": "Hello",
            "refusal": None,
            "annotations": [],
            "audio": None,
            "function_call": None,
            "tool_calls": None,
            "reasoning_content": None,
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "index": 0, "function": {"name": "weather", "arguments": ""}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}], "name": "weather"},
        {"role": "user", "content": "And?"},
    ]
    some = {"max_tokens": 5, "temperature": 0}
    with server.client() as client:
        chat = {"messages": turns, **some}
        plain = client.post("/v1/chat/completions", json=chat).json()["choices"]
        assert client.post("/v1/chat/completions", json={**NOTHING, **chat}).json()["choices"] == plain
        empty: dict[str, Any] = {"tools": [], "stop": [], "logit_bias": {}, "metadata": {}}
        assert client.post("/v1/chat/completions", json={**NOTHING, **empty, **chat}).json()["choices"] == plain
        text = client.post("/v1/completions", json={"prompt": "x", **some}).json()["choices"]
        assert client.post("/v1/completions", json={**NOTHING, "prompt": "x", **some}).json()["choices"] == text
