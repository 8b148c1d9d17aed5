"""Anthropic's messages over HTTP and with Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import jsonschema
import pydantic
import pytest

from qnext.server.errors import ApiError
from tests.server.scripts import failing_stream, is_idle, named_events, recorded_prompts, scripted
from tests.server.serving import Running, running_server

LOOK = {
    "name": "look",
    "description": "Look out of the window",
    "input_schema": {
        "type": "object",
        "properties": {"where": {"enum": ["north", "south"]}, "far": {"type": "boolean"}},
        "required": ["where", "far"],
        "additionalProperties": False,
    },
}
WAIT = {"name": "wait", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Say something."}]
ASK: dict[str, Any] = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 24, "temperature": 0}
CALL = '<tool_call>\n{"name": "look", "arguments": {"n": 12345678901234567890123}}\n</tool_call>'
CALLED: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "Which way?", "signature": ""},
    {"type": "redacted_thinking", "data": "b2s="},
    {"type": "text", "text": "I look."},
    {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"where": "north", "far": True}},
    {"type": "tool_use", "id": "toolu_2", "name": "wait", "input": {}},
]


@pytest.fixture(scope="module")
def thinking(thinking_model: Path) -> Iterator[Running]:
    with running_server(thinking_model) as running:
        yield running


@pytest.fixture
def client(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def post(running: Running, body: dict[str, Any], path: str = "/v1/messages") -> Any:
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "some-2026-01-01"}
    with running.client() as http:
        return http.post(path, json=body, headers=headers)


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream makes, by the rules of Anthropic's documentation; checks their order."""
    assert events[0]["type"] == "message_start" and events[1] == {"type": "ping"}
    message = dict(events[0]["message"])
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    blocks: list[dict[str, Any]] = message["content"]
    texts: list[str] = []
    is_open = False
    keys = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            is_open, texts = True, []
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            delta = event["delta"]
            if delta["type"] == "signature_delta":
                blocks[-1]["signature"] = delta["signature"]
            else:
                texts.append(delta[keys[delta["type"]]])
        else:
            assert event == {"type": "content_block_stop", "index": len(blocks) - 1} and is_open
            is_open = False
            kind = blocks[-1]["type"]
            blocks[-1]["input" if kind == "tool_use" else kind] = "".join(texts)
    assert not is_open and events[-2]["type"] == "message_delta" and events[-1] == {"type": "message_stop"}
    return {**message, **events[-2]["delta"], "usage": events[-2]["usage"]}


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two answers to one request: ids and what was cached."""
    usage = dict(message["usage"])
    usage["input_tokens"] += usage.pop("cache_read_input_tokens")
    blocks = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {**message, "id": None, "content": blocks, "usage": usage}


def test_a_streamed_message_is_the_whole_one(server: Running) -> None:
    whole = post(server, ASK).json()
    streamed = accumulated(named_events(post(server, {**ASK, "stream": True})))
    assert whole["type"] == "message" and whole["role"] == "assistant" and whole["id"].startswith("msg_")
    assert whole["stop_reason"] == "max_tokens" and whole["stop_sequence"] is None
    assert whole["content"][0]["text"] and whole["usage"]["output_tokens"] == 24
    assert comparable(streamed) == comparable(whole)


def test_thought_text_and_calls_are_blocks_in_their_order(thinking: Running) -> None:
    body = {**ASK, "model": "tiny-thinking", "tools": [LOOK, WAIT], "max_tokens": 400}
    other = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
    with scripted(thinking, f"Hm, {{}}.\n</think>\n\nI look.\n{CALL}\n{other}"):
        whole = post(thinking, body)
        events = named_events(post(thinking, {**body, "stream": True}))
    thought, text, first, second = whole.json()["content"]
    assert thought == {"type": "thinking", "thinking": "Hm, {}.", "signature": ""}
    assert text == {"type": "text", "text": "I look."}
    assert first["id"].startswith("toolu_") and first["id"] != second["id"]
    assert (first["name"], second["name"], second["input"]) == ("look", "wait", {})
    assert first["input"] == {"n": 12345678901234567890123}, "as the model wrote it"
    assert whole.json()["stop_reason"] == "tool_use"
    streamed = accumulated(events)
    for block in streamed["content"][2:]:
        assert block["input"] in whole.text, "the streamed text of the input stands in the whole answer"
        block["input"] = json.loads(block["input"])
    assert comparable(streamed) == comparable(whole.json())
    changes = [f"{e['type']} {e['delta']['type']}" if "delta" in e and "index" in e else e["type"] for e in events]
    order = [name for index, name in enumerate(changes) if index == 0 or name != changes[index - 1]]
    block = ["content_block_start", "content_block_delta input_json_delta", "content_block_stop"]
    assert order == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta thinking_delta",
        "content_block_delta signature_delta",
        "content_block_stop",
        "content_block_start",
        "content_block_delta text_delta",
        "content_block_stop",
        *block,
        *block,
        "message_delta",
        "message_stop",
    ]


def test_thinking_can_be_disabled(thinking: Running) -> None:
    body = {**ASK, "model": "tiny-thinking"}
    with recorded_prompts(thinking) as prompts:
        answer = post(thinking, {**body, "thinking": {"type": "disabled"}}).json()
        thought = post(thinking, {**body, "thinking": {"type": "enabled", "budget_tokens": 1024}}).json()
    assert prompts[0].endswith("<think>\n\n</think>\n\n") and prompts[1].endswith("<think>\n")
    assert answer["content"][0]["type"] == "text" and thought["content"][0]["type"] == "thinking"
    assert answer["usage"]["output_tokens_details"]["thinking_tokens"] == 0
    assert thought["usage"]["output_tokens_details"]["thinking_tokens"] == 24


def test_a_stop_sequence_is_named(server: Running) -> None:
    body = {**ASK, "stop_sequences": ["never", "STOP"]}
    with scripted(server, "one STOP two"):
        whole = post(server, body).json()
        streamed = accumulated(named_events(post(server, {**body, "stream": True})))
    assert whole["content"] == [{"type": "text", "text": "one "}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "STOP")
    assert comparable(streamed) == comparable(whole)
    with scripted(server, "one two"):
        assert post(server, body).json()["stop_reason"] == "end_turn"


def test_the_last_turn_of_the_assistant_is_continued(server: Running, thinking: Running) -> None:
    begun = [*HELLO, {"role": "assistant", "content": [CALLED[0], {"type": "text", "text": "Well, "}]}]
    with recorded_prompts(server) as prompts, scripted(server, "yes."):
        answer = post(server, {**ASK, "messages": begun}).json()
    assert prompts[0].endswith("<|im_start|>assistant\nWell, ")
    assert answer["content"] == [{"type": "text", "text": "yes."}], "without what was given"
    with recorded_prompts(thinking) as prompts, scripted(thinking, "yes."):
        answer = post(thinking, {**ASK, "model": "tiny-thinking", "messages": begun}).json()
    assert prompts[0].endswith("<|im_start|>assistant\n<think>\nWhich way?\n</think>\n\nWell, ")
    assert answer["content"] == [{"type": "text", "text": "yes."}]
    refused = post(server, {**ASK, "messages": [*HELLO, {"role": "assistant", "content": CALLED}]})
    assert refused.status_code == 400, "calls without results are no beginning of an answer"


def test_turns_of_blocks_become_the_chat_formats_messages(server: Running) -> None:
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    results = [
        {
            "type": "tool_result",
            "tool_use_id": "toolu_2",
            "content": [{"type": "text", "text": "late", **mark}],
            "is_error": True,
        },
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain", **mark},
        {"type": "text", "text": "And now?", **mark},
    ]
    body = {
        **ASK,
        "tools": [LOOK, {**WAIT, "type": "custom", **mark}],
        "system": [{"type": "text", "text": "Be brief.", **mark}, {"type": "text", "text": "Be kind."}],
        "messages": [
            *HELLO,
            {"role": "user", "content": "Please."},
            {"role": "assistant", "content": CALLED},
            {"role": "user", "content": results},
        ],
        "metadata": {"user_id": "someone"},
        "service_tier": "auto",
        **mark,
    }
    with recorded_prompts(server) as prompts:
        assert post(server, body).status_code == 200
    (prompt,) = prompts
    assert prompt.startswith("<|im_start|>system\nBe brief.\nBe kind.\n\n# Tools")
    turns = prompt.split("<|im_start|>", 2)[2]
    assert turns == (
        "user\nSay something.\nPlease.<|im_end|>\n<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "look", "arguments": {"where": "north", "far": true}}\n</tool_call>\n'
        '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call><|im_end|>\n'
        # In the order of the calls, whose ids the format does not write.
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nError: late\n</tool_response>"
        "<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": "Be brief.", "tools": [LOOK], "tool_choice": {"type": "auto"}},
        {"tools": [LOOK], "tool_choice": {"type": "none"}},
    ],
)
def test_counted_tokens_are_those_of_the_answer(server: Running, more: dict[str, Any]) -> None:
    body = {"model": "tiny-chat", "messages": HELLO, **more}
    counted = post(server, body, "/v1/messages/count_tokens")
    usage = post(server, {**ASK, **more}).json()["usage"]
    again = post(server, {**ASK, **more}).json()["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert counted.json()["input_tokens"] == again["input_tokens"] + again["cache_read_input_tokens"]
    assert counted.headers["request-id"] == counted.headers["x-request-id"]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://localhost/secret.png"}}


@pytest.mark.parametrize(
    ("more", "status", "kind", "text"),
    [
        ({"model": "other"}, 404, "not_found_error", "no such model"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"temperature": "1"}, 400, "invalid_request_error", "temperature"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0: this model reads text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            400,
            "invalid_request_error",
            "text only",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0.text.text",
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            400,
            "invalid_request_error",
            "messages.0.content.0",
        ),
        ({"messages": [{"role": "user", "content": [CALLED[3]]}]}, 400, "invalid_request_error", "role"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}], "tool_choice": {"type": "any"}},
            400,
            "invalid_request_error",
            "tool_choice",
        ),
        ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, 400, "invalid_request_error", "tools.0"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "b"}}, 400, "invalid_request_error", "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "pear"}}}},
            400,
            "invalid_request_error",
            "output_config.format.schema",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * 3000}]},
            400,
            "invalid_request_error",
            "prompt is too long: 3",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_form(
    server: Running, more: dict[str, Any], status: int, kind: str, text: str, stream: bool
) -> None:
    body = {key: value for key, value in {**ASK, **more, "stream": stream}.items() if value is not None}
    answer = post(server, body)
    assert answer.status_code == status
    error = answer.json()
    assert set(error) == {"type", "error"} and error["type"] == "error" and error["error"]["type"] == kind
    assert text in error["error"]["message"] and "secret" not in answer.text
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


def test_a_silence_is_pinged_and_a_failure_ends_the_stream(server: Running) -> None:
    with failing_stream(ApiError.busy("the server is stopping", retry_after=1)):
        events = named_events(post(server, {**ASK, "stream": True}))
    names = [event["type"] for event in events]
    assert names[:2] == ["message_start", "ping"] and names[-1] == "error"
    assert events[-1]["error"] == {"type": "overloaded_error", "message": "the server is stopping"}
    assert "message_stop" not in names
    assert is_idle(server), "nobody reads what would still come"


def test_the_client_reads_whole_and_streamed_messages(server: Running, client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 24, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert isinstance(whole.content[0], anthropic.types.TextBlock) and whole._request_id
    assert text == whole.content[0].text == final.content[0].text  # type: ignore[union-attr]
    assert final.stop_reason == whole.stop_reason == "max_tokens"
    assert final.usage.output_tokens == whole.usage.output_tokens == 24
    count = client.messages.count_tokens(model="tiny-chat", messages=HELLO)  # type: ignore[arg-type]
    assert count.input_tokens == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**ask, "model": "other"})


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "look"}]
)
def test_the_client_goes_round_with_tools(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    ask: dict[str, Any] = {"model": "tiny-chat", "max_tokens": 400, "tools": [LOOK], "extra_body": {"temperature": 0}}
    whole = client.messages.create(**ask, messages=HELLO, tool_choice=choice)
    with client.messages.stream(**ask, messages=HELLO, tool_choice=choice) as stream:
        final = stream.get_final_message()
    assert whole.stop_reason == final.stop_reason == "tool_use"
    (call,) = whole.content
    assert isinstance(call, anthropic.types.ToolUseBlock) and call.name == "look"
    jsonschema.validate(call.input, LOOK["input_schema"])
    assert final.content[0].input == call.input  # type: ignore[union-attr]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    turns = [*HELLO, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**{**ask, "max_tokens": 8}, messages=turns)
    assert after.usage.output_tokens == 8


class Verdict(pydantic.BaseModel):
    answer: Literal["yes", "no"]
    sure: bool


def test_the_client_parses_answers_of_a_schema(client: anthropic.Anthropic) -> None:
    parsed = client.messages.parse(
        model="tiny-chat",
        max_tokens=300,
        messages=HELLO,
        output_format=Verdict,  # type: ignore[arg-type]
        extra_body={"temperature": 0},
    )
    assert isinstance(parsed.parsed_output, Verdict) and parsed.stop_reason == "end_turn"


def test_the_client_raises_what_ends_a_stream(client: anthropic.Anthropic) -> None:
    with (
        failing_stream(ApiError.busy("the server is stopping", retry_after=1)),
        client.messages.stream(model="tiny-chat", max_tokens=8, messages=HELLO) as stream,  # type: ignore[arg-type]
        pytest.raises(anthropic.APIStatusError, match="stopping"),
    ):
        stream.get_final_message()
