"""Tools, structured output and reasoning, with a random model that constraints force into form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.server.serving import Running, running_server
from tests.server.test_chat import chunks

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Forecast of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather?"}],
    "tools": [WEATHER, TIME],
    "max_tokens": 400,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def thinking(thinking_model: Path) -> Iterator[Running]:
    with running_server(thinking_model) as running:
        yield running


def streamed_calls(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            for part in choice["delta"].get("tool_calls", []):
                if "id" in part:
                    assert part["index"] == len(calls) and part["function"]["arguments"] == ""
                    calls[part["index"]] = part["function"]
                else:
                    assert part["index"] == len(calls) - 1, "one call after another"
                    calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return [calls[index] for index in sorted(calls)]


def test_a_named_tool_is_called_with_arguments_of_its_schema(server: Running) -> None:
    body = {**ASK, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    with server.client() as client:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        streamed = chunks(client.post("/v1/chat/completions", json={**body, "stream": True}))
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "weather" and call["type"] == "function" and call["id"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])
    assert streamed_calls(streamed) == [call["function"]]
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_required_calls_some_tool_and_only_one_when_told_so(server: Running) -> None:
    with server.client() as client:
        body = {**ASK, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 3}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] in ("weather", "time") and choice["finish_reason"] == "tool_calls"


def test_a_tool_that_is_not_offered_cannot_be_chosen(server: Running) -> None:
    choice: dict[str, Any] = {"type": "function", "function": {"name": "other"}}
    with server.client() as client:
        assert client.post("/v1/chat/completions", json={**ASK, "tool_choice": choice}).status_code == 400
        assert (
            client.post("/v1/chat/completions", json={**ASK, "tools": [], "tool_choice": "required"}).status_code == 400
        )
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}}
        answer = client.post("/v1/chat/completions", json={**ASK, "tool_choice": allowed, "seed": 1}).json()
    assert {call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]} == {"time"}


def test_results_of_tools_are_read(server: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    with server.client() as client:
        with_tools = {"messages": messages, "tools": ASK["tools"], "max_tokens": 4}
        answer = client.post("/v1/chat/completions", json=with_tools)
        assert answer.status_code == 200, answer.text
        fewer = client.post("/v1/chat/completions", json={**with_tools, "messages": messages[:1]}).json()
    assert answer.json()["usage"]["prompt_tokens"] > fewer["usage"]["prompt_tokens"]


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
    ],
)
def test_answers_follow_a_schema(server: Running, form: dict[str, Any]) -> None:
    body = {"messages": ASK["messages"], "max_tokens": 300, "temperature": 1, "seed": 2, **form}
    with server.client() as client:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"structured_outputs": {"choice": ["red", "blue"]}}, {"red", "blue"}),
        ({"guided_regex": "a{3}b"}, {"aaab"}),
        ({"guided_grammar": 'start: "x" | "y"'}, {"x", "y"}),
    ],
)
def test_other_constraints(server: Running, form: dict[str, Any], expected: set[str]) -> None:
    with server.client() as client:
        for path, body in (
            ("/v1/chat/completions", {"messages": ASK["messages"]}),
            ("/v1/completions", {"prompt": "Colour: "}),
        ):
            answer = client.post(path, json={**body, "max_tokens": 20, **form}).json()["choices"][0]
            assert (answer.get("text") or answer["message"]["content"]) in expected


def test_reasoning_has_both_names_and_ends_before_the_content(thinking: Running) -> None:
    body = {
        "messages": ASK["messages"],
        "max_tokens": 600,
        "guided_choice": ["done"],
        "temperature": 0,
        "logit_bias": {str(thinking.server.served.think_end[0]): 30},
    }
    with thinking.client() as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        found = chunks(client.post("/v1/chat/completions", json={**body, "stream": True}))
    message = whole["choices"][0]["message"]
    assert message["content"] == "done"
    deltas = [choice["delta"] for chunk in found for choice in chunk["choices"]]
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert reasoning == "".join(delta.get("reasoning", "") for delta in deltas) == message.get("reasoning_content", "")
    assert "".join(delta.get("content", "") for delta in deltas) == "done"
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 1


def test_a_thought_that_never_ends_is_reasoning_alone(thinking: Running) -> None:
    body = {
        "messages": ASK["messages"],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {str(thinking.server.served.think_end[0]): -100},
    }
    with thinking.client() as client:
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        quick = client.post("/v1/chat/completions", json={**body, "chat_template_kwargs": {"enable_thinking": False}})
    assert choice["finish_reason"] == "length" and choice["message"]["reasoning_content"]
    assert choice["message"]["content"] is None
    assert "reasoning_content" not in quick.json()["choices"][0]["message"]
