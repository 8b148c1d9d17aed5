"""OpenAI's responses over HTTP and with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from openai.types.responses import Response

from qnext.server.errors import ApiError
from tests.server.scripts import failing_stream, is_idle, named_events, recorded_prompts, scripted
from tests.server.serving import Running, running_server

LOOK = {
    "type": "function",
    "name": "look",
    "description": "Look out of the window",
    "parameters": {
        "type": "object",
        "properties": {"where": {"enum": ["north", "south"]}, "far": {"type": "boolean"}},
        "required": ["where", "far"],
        "additionalProperties": False,
    },
    "strict": True,
}
WAIT = {
    "type": "function",
    "name": "wait",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
ASK: dict[str, Any] = {"model": "tiny-chat", "input": "Say something.", "max_output_tokens": 24, "temperature": 0}
CALL = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def thinking(thinking_model: Path) -> Iterator[Running]:
    with running_server(thinking_model) as running:
        yield running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(running: Running, body: dict[str, Any]) -> Any:
    with running.client() as http:
        return http.post("/v1/responses", json=body)


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last event's response, after everything else that the stream said was found to be the same."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    items: dict[int, dict[str, Any]] = {}
    ids: list[str] = []
    text = ""
    logged: list[Any] = []
    for event in events[2:-1]:
        name, index = event["type"].removeprefix("response."), event["output_index"]
        if name == "output_item.added":
            assert index == len(ids) and event["item"]["status"] == "in_progress"
            ids.append(event["item"]["id"])
            text, logged = "", []
        elif name == "output_item.done":
            assert event["item"]["id"] == ids[-1]
            items[index] = event["item"]
        else:
            assert event["item_id"] == ids[-1] and event.get("content_index", 0) == 0
        if name.endswith(".delta"):
            text += event["delta"]
            logged += event.get("logprobs", [])
        elif name in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == text and event.get("logprobs", []) == logged
        elif name == "function_call_arguments.done":
            assert event["arguments"] == text
        elif name == "content_part.done":
            assert event["part"]["text"] == text and event["part"].get("logprobs", []) == logged
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert last["output"] == [items[index] for index in range(len(ids))]
    return last  # type: ignore[no-any-return]


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two answers to one request: ids, times and what was cached."""
    Response.model_validate(response)
    usage = {**response["usage"], "input_tokens_details": None}
    output = [
        {key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]
    ]
    return {**response, "id": None, "created_at": None, "completed_at": None, "usage": usage, "output": output}


def test_a_streamed_response_is_the_whole_one(server: Running) -> None:
    whole = post(server, ASK).json()
    streamed = accumulated(named_events(post(server, {**ASK, "stream": True})))
    assert whole["object"] == "response" and whole["id"].startswith("resp_") and whole["store"] is False
    assert whole["status"] == "incomplete" and whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete" and whole["output"][0]["content"][0]["text"]
    assert whole["usage"]["output_tokens"] == 24
    assert comparable(streamed) == comparable(whole)


def test_reasoning_text_and_calls_are_items_in_their_order(thinking: Running) -> None:
    body = {**ASK, "model": "tiny-thinking", "tools": [LOOK, WAIT], "max_output_tokens": 400, "top_logprobs": 1}
    with scripted(thinking, f"Hm.\n</think>\n\nI wait.\n{CALL}\n{CALL}"):
        whole = post(thinking, body).json()
        events = named_events(post(thinking, {**body, "stream": True}))
    reasoning, message, first, second = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "I wait." and message["role"] == "assistant"
    assert "".join(entry["token"] for entry in message["content"][0]["logprobs"]) == "I wait."
    assert first["call_id"].startswith("call_") and first["call_id"] != second["call_id"]
    assert (first["name"], first["arguments"]) == (second["name"], second["arguments"]) == ("wait", "{}")
    assert whole["status"] == "completed" and whole["completed_at"] is not None
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > len("Hm.")
    assert comparable(accumulated(events)) == comparable(whole)
    names = [event["type"].removeprefix("response.") for event in events]
    order = [name for index, name in enumerate(names) if index == 0 or name != names[index - 1]]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert order == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *call,
        *call,
        "completed",
    ]


def test_effort_none_does_not_think(thinking: Running) -> None:
    with recorded_prompts(thinking) as prompts:
        answer = post(thinking, {**ASK, "model": "tiny-thinking", "reasoning": {"effort": "none"}}).json()
    assert prompts[0].endswith("<think>\n\n</think>\n\n") and answer["output"][0]["type"] == "message"
    assert answer["reasoning"]["effort"] == "none"


def test_items_become_the_chat_formats_messages(thinking: Running) -> None:
    items = [
        {"type": "message", "role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Say "}, {"type": "input_text", "text": "it."}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "unread"}],
            "content": [{"type": "reasoning_text", "text": "Which way?"}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "look", "arguments": '{"far": true}'},
        {"type": "function_call", "call_id": "b", "name": "wait", "arguments": ""},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "late"}]},
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Once more."}]},
        {"type": "function_call", "call_id": "c", "name": "wait", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "done"},
    ]
    body = {**ASK, "model": "tiny-thinking", "instructions": "Be brief.", "input": items}
    with recorded_prompts(thinking) as prompts:
        assert post(thinking, body).status_code == 200
    assert prompts == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n<think>\nWhich way?\n</think>\n\nI look.\n"
        '<tool_call>\n{"name": "look", "arguments": {"far": true}}\n</tool_call>\n'
        '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nlate\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nOnce more.\n</think>\n\n"
        '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
    ]


def test_a_response_says_what_was_asked(server: Running) -> None:
    asked = {
        "instructions": "Be brief.",
        "metadata": {"run": "7"},
        "tools": [LOOK],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "top_p": 0.5,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "truncation": "disabled",
    }
    answer = post(server, {**ASK, **asked, "store": True, "prompt_cache_key": "x", "safety_identifier": "y"}).json()
    assert {key: answer[key] for key in asked} == asked
    assert answer["store"] is False and answer["temperature"] == 0 and answer["max_output_tokens"] == 24


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"conversation": {"id": "conv_1"}}, 400, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, 400, "prompt"),
        ({"background": True}, 400, "background"),
        ({"truncation": "middle"}, 400, "truncation"),
        ({"temperature": 2.5}, 400, "temperature"),
        ({"max_output_tokens": True}, 400, "max_output_tokens"),
        ({"metadata": {"key": "x" * 513}}, 400, "metadata"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": [LOOK, {**LOOK, "description": "Another"}]}, 400, "tools.1"),
        ({"tool_choice": {"type": "function", "name": "look"}}, 400, "tool_choice"),
        ({"input": [{"type": "input_image", "image_url": "data:"}]}, 400, "input.0"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://localhost/secret"}]}]},
            400,
            "input.0.content",
        ),
        ({"input": [{"role": "user", "content": 5}]}, 400, "input.0.message.content"),
        ({"input": [{"type": "function_call_output", "output": "y"}]}, 400, "input.0.function_call_output.call_id"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 400, "text.format.schema"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "pear"}}}},
            400,
            "text.format.schema",
        ),
        ({"top_logprobs": 21}, 400, "top_logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused(
    server: Running, more: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    answer = post(server, {**ASK, **more, "stream": stream})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert "secret" not in answer.text


def test_a_failure_is_the_streams_last_event(server: Running) -> None:
    with failing_stream(ApiError.busy("the server is stopping", retry_after=1)):
        answer = post(server, {**ASK, "stream": True})
    events = named_events(answer)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    failed = events[-1]["response"]
    assert events[-1]["type"] == "response.failed" and failed["status"] == "failed"
    assert failed["error"] == {"code": "server_error", "message": "the server is stopping"}
    assert all(item["status"] == "incomplete" for item in failed["output"])
    Response.model_validate(failed)
    assert is_idle(server), "nobody reads what would still come"


def test_the_client_reads_whole_and_streamed_responses(server: Running, client: openai.OpenAI) -> None:
    with scripted(server, "Something, then."):
        whole = client.responses.create(**ASK)
        with client.responses.stream(**ASK) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
    assert whole.output_text == final.output_text == "".join(deltas) == "Something, then."
    assert whole.status == final.status == "completed" and final.usage is not None
    assert final.usage.output_tokens == len("Something, then.") + 1, "and the token that ends it"


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "look"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]},
    ],
)
def test_the_client_goes_round_with_tools(client: openai.OpenAI, choice: Any) -> None:
    tools: Any = [LOOK] if choice == "required" else [WAIT, LOOK]
    more: dict[str, Any] = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    body: dict[str, Any] = {**ASK, "max_output_tokens": 400, **more}
    whole = client.responses.create(**body)
    with client.responses.stream(**body) as stream:
        final = stream.get_final_response()
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "look" and whole.status == "completed"
    (same,) = final.output
    assert same.type == "function_call" and same.arguments == call.arguments
    assert same.parsed_arguments["where"] in ("north", "south"), "the tool is strict, so the client parses"
    jsonschema.validate(same.parsed_arguments, LOOK["parameters"])  # type: ignore[arg-type]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    turns: Any = [{"role": "user", "content": ASK["input"]}, *whole.output, result]
    after = client.responses.create(**{**ASK, "input": turns, "tools": tools})
    assert after.usage is not None and after.usage.output_tokens == 24


class Verdict(pydantic.BaseModel):
    answer: Literal["yes", "no"]
    sure: bool


def test_the_client_parses_answers_of_a_schema(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {**ASK, "max_output_tokens": 300, "text_format": Verdict}
    parsed = client.responses.parse(**body)
    assert isinstance(parsed.output_parsed, Verdict) and parsed.status == "completed"
    with client.responses.stream(**body) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
