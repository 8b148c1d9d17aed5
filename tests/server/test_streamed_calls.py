"""Tool calls piece by piece, on every surface, as the official clients put them together; and silent streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Container, Iterable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import openai
import pytest

from qnext.server.inference import generation as generation_module
from qnext.server.inference.generation import Silence, Update
from qnext.server.limits import Limits
from qnext.server.surfaces.writing import named_frames, write_stream
from tests.server.scripts import named_events, scripted
from tests.server.serving import Running, running_server
from tests.server.test_chat import chunks

PARAMETERS = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}, "more": {"type": "object"}},
}
XML = "<tool_call>\n<function=write>\n<parameter={}>\n{}\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{{"name": "write", "arguments": {}}}\n</tool_call>'
PYTHON = (
    "<tool_call>\n{'name': 'write', 'arguments': {'path': 'it\\'s', 'more': {'y': None, 'z': True,}}}\n</tool_call>"
)
# What the model writes, and the arguments that are meant.
WRITTEN: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "json": (
        "I see.\n" + JSON.format('{"path": "a \\"b\\" é", "more": {"x": [1, 2.50]}}'),
        [{"path": 'a "b" é', "more": {"x": [1, 2.5]}}],
    ),
    "xml": (XML.format("path", "two\nlines <b>"), [{"path": "two\nlines <b>"}]),
    "python": (PYTHON, [{"path": "it's", "more": {"y": None, "z": True}}]),
    "no end": (
        XML.format("lines", "3").removesuffix("</parameter>\n</function>\n</tool_call>") + "</function>",
        [{"lines": 3}],
    ),
    "two": (JSON.format("{}") + "\n" + XML.format("path", "x"), [{}, {"path": "x"}]),
    "no arguments": (JSON.format("{}"), [{}]),
}
CUT = JSON.format('{"lines": 12, "more": {"k": "v"}, "path": "never') + " "
SURFACES = ("chat", "responses", "messages")


def on_surfaces(names: Iterable[str], everywhere: Container[str]) -> list[Any]:
    """(name, surface); what shows no more on a second surface is asked for there by `make test-all`."""
    pairs = product(names, SURFACES)
    return [
        pytest.param(name, surface, marks=() if surface == "chat" or name in everywhere else pytest.mark.slow)
        for name, surface in pairs
    ]


def body_of(surface: str, **more: Any) -> tuple[str, dict[str, Any]]:
    ask = [{"role": "user", "content": "Write."}]
    if surface == "chat":
        tool: dict[str, Any] = {"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}
        return "/v1/chat/completions", {"model": "tiny-chat", "messages": ask, "tools": [tool], **more}
    if surface == "responses":
        tool = {"type": "function", "name": "write", "parameters": PARAMETERS}
        more["max_output_tokens"] = more.pop("max_tokens", 400)
        return "/v1/responses", {"model": "tiny-chat", "input": "Write.", "tools": [tool], **more}
    tool = {"name": "write", "input_schema": PARAMETERS}
    return "/v1/messages", {"model": "tiny-chat", "messages": ask, "tools": [tool], "max_tokens": 400, **more}


def whole_calls(surface: str, answer: dict[str, Any]) -> list[Any]:
    """The arguments of an answer's calls, as text for OpenAI's surfaces."""
    if surface == "chat":
        return [call["function"]["arguments"] for call in answer["choices"][0]["message"].get("tool_calls") or ()]
    if surface == "responses":
        return [item["arguments"] for item in answer["output"] if item["type"] == "function_call"]
    return [block["input"] for block in answer["content"] if block["type"] == "tool_use"]


def client_calls(running: Running, surface: str, **more: Any) -> list[Any]:
    """The same, put together from a stream by the surface's own client."""
    _, body = body_of(surface, **more)
    if surface == "messages":
        with (
            anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client,
            client.messages.stream(**body) as stream,
        ):
            return [block.input for block in stream.get_final_message().content if block.type == "tool_use"]
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as sdk:
        if surface == "chat":
            with sdk.chat.completions.stream(**body) as chat:
                list(chat)
                message = chat.current_completion_snapshot.choices[0].message
                return [call.function.arguments for call in message.tool_calls or ()]
        with sdk.responses.stream(**body) as response:
            last: Any = list(response)[-1]  # response.completed or, of an answer that is cut, response.incomplete
        return [item.arguments for item in last.response.output if item.type == "function_call"]


@pytest.mark.parametrize(("name", "surface"), on_surfaces(WRITTEN, {"json", "two"}))
def test_the_clients_put_together_the_whole_answers_calls(server: Running, name: str, surface: str) -> None:
    text, meant = WRITTEN[name]
    with scripted(server, text), server.client() as http:
        path, body = body_of(surface)
        whole = whole_calls(surface, http.post(path, json=body).json())
        assert client_calls(server, surface) == whole
    assert [json.loads(call) if isinstance(call, str) else call for call in whole] == meant


@pytest.mark.parametrize("surface", SURFACES)
def test_arguments_come_in_pieces(server: Running, surface: str) -> None:
    with scripted(server, WRITTEN["json"][0]), server.client() as http:
        path, body = body_of(surface, stream=True)
        answer = http.post(path, json=body)
    if surface == "chat":
        parts = [
            part
            for chunk in chunks(answer)
            for choice in chunk["choices"]
            for part in choice["delta"].get("tool_calls", ())
        ]
        assert [part["index"] for part in parts] == [0] * len(parts)
        assert parts[0]["id"] and parts[0]["function"] == {"name": "write", "arguments": ""}
        assert all(part.keys() == {"index", "function"} for part in parts[1:])
        pieces = [part["function"]["arguments"] for part in parts[1:]]
    elif surface == "responses":
        found = named_events(answer)
        kind = "response.function_call_arguments."
        pieces = [event["delta"] for event in found if event["type"] == kind + "delta"]
        assert [event["arguments"] for event in found if event["type"] == kind + "done"] == ["".join(pieces)]
    else:
        deltas = [event["delta"] for event in named_events(answer) if event["type"] == "content_block_delta"]
        pieces = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert len(pieces) > 10 and json.loads("".join(pieces)) == WRITTEN["json"][1][0]


@pytest.mark.parametrize("surface", SURFACES)
def test_a_call_that_is_cut_off_is_no_whole_one_anywhere(server: Running, surface: str) -> None:
    """As OpenAI and Anthropic do it: the beginning of the arguments, and the reason of an answer that was too long."""
    num_tokens = CUT.index("never") + 3  # bytes; the tag is one token
    num_tokens -= len("<tool_call>") - 1
    with scripted(server, CUT), server.client() as http:
        path, body = body_of(surface, max_tokens=num_tokens)
        answer = http.post(path, json=body).json()
        (cut,) = whole_calls(surface, answer)
        assert client_calls(server, surface, max_tokens=num_tokens) == [cut]
    if surface == "messages":
        assert cut == {"lines": 12, "more": {"k": "v"}} and answer["stop_reason"] == "max_tokens"
        return
    assert cut == '{"lines": 12, "more": {"k": "v"}, "path": "nev'
    status = answer["choices"][0]["finish_reason"] if surface == "chat" else answer["status"]
    assert status == ("length" if surface == "chat" else "incomplete")


@pytest.mark.parametrize(("name", "surface"), on_surfaces(["two", "list"], {"two"}))
def test_one_call_where_no_more_are_allowed(server: Running, name: str, surface: str) -> None:
    text = WRITTEN["two"][0]
    if name == "list":
        text = (
            '<tool_call>[{"name": "write", "arguments": {}}, {"name": "write", "arguments": {"lines": 1}}]</tool_call>'
        )
    more: dict[str, Any] = {"parallel_tool_calls": False}
    if surface == "messages":
        more = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    with scripted(server, text), server.client() as http:
        path, body = body_of(surface)
        assert len(whole_calls(surface, http.post(path, json=body).json())) == 2
        assert len(whole_calls(surface, http.post(path, json={**body, **more}).json())) == 1
        assert len(client_calls(server, surface, **more)) == 1


# Silence


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_no_stream_is_silent_for_long_whatever_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting, tokens without text, text: by a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(generation_module, "time", clock)
    silence = Silence(10.0)
    token = Update(0, None, None)

    async def updates() -> AsyncIterator[list[Update]]:
        for step in range(200):
            clock.now += 0.9
            if step % 50 < 20:  # nothing at all
                if silence.is_long:
                    silence.end()
                    yield []
            else:
                yield [token]

    @asynccontextmanager
    async def generating() -> AsyncIterator[Any]:
        yield SimpleNamespace(silence=silence, updates=updates)

    num_taken = 0

    def take(*_: Any) -> list[dict[str, Any]]:
        nonlocal num_taken
        num_taken += 1
        return [{"type": "text"}] if num_taken % 40 == 0 else []

    writer: Any = SimpleNamespace(
        begin=lambda _: [],
        take=take,
        ping=lambda: {"type": "ping"},
        end=lambda _: [{"type": "end"}],
        frames=named_frames,
    )
    sent: list[tuple[float, bytes]] = []

    async def run() -> None:
        exchange: Any = SimpleNamespace(is_replying=True, is_long=False)
        async for frames in write_stream(exchange, generating(), writer):
            assert frames
            sent.append((clock.now, frames))

    asyncio.run(run())
    times = [0.0, *(time for time, _ in sent)]
    assert max(after - before for before, after in pairwise(times)) <= 11.0
    assert sum(b"ping" in frames for _, frames in sent) < 20, "only where it is silent"


@pytest.fixture(scope="module")
def impatient(chat_model: Path) -> Iterator[Running]:
    with running_server(chat_model, limits=Limits(drain_seconds=1.0, ping_seconds=0.005)) as running:
        yield running


@pytest.mark.parametrize("surface", [*SURFACES, "completions"])
def test_a_value_that_is_held_back_is_no_silence(impatient: Running, surface: str) -> None:
    """An object's text comes out when it is whole; meanwhile there are events that clients count, not comments."""
    held = XML.format("more", json.dumps({"key": "x" * 150}))
    path, body = body_of("chat" if surface == "completions" else surface, stream=True)
    if surface == "completions":  # its first tokens make no text that could be sent: a stop string might begin
        path, body = "/v1/completions", {"prompt": "x", "stop": ["x" * 150], "max_tokens": 200, "stream": True}
        held = "x" * 149 + "y"
    with scripted(impatient, held), impatient.client() as http:
        if surface == "completions":
            body["guided_grammar"] = "start: " + json.dumps(held)
        answer = http.post(path, json=body)
    assert answer.status_code == 200 and "\n:" not in answer.text
    if surface in ("chat", "completions"):
        empty = [
            chunk
            for chunk in chunks(answer)
            for choice in chunk["choices"]
            if choice.get("delta") == {} or choice.get("text") == ""
        ]
        assert len(empty) > 2
    else:
        kind = "keepalive" if surface == "responses" else "ping"
        assert sum(event["type"] == kind for event in named_events(answer)) > 2


def test_an_echo_without_new_tokens_streams_none(server: Running) -> None:
    body = {"prompt": "Once upon", "max_tokens": 0, "echo": True, "logprobs": 1}
    with server.client() as http:
        (whole,) = http.post("/v1/completions", json=body).json()["choices"]
        found = [chunk["choices"][0] for chunk in chunks(http.post("/v1/completions", json={**body, "stream": True}))]
    assert "".join(choice["text"] for choice in found) == whole["text"] == "Once upon"
    tokens = [token for choice in found for token in (choice["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    assert (
        [choice["finish_reason"] for choice in found if choice["finish_reason"]]
        == [whole["finish_reason"]]
        == ["length"]
    )


@pytest.mark.parametrize("starts", [True, False])
def test_stop_strings_leave_the_thought_alone(thinking_model: Path, chat_model: Path, starts: bool) -> None:
    """The thought that the prompt opened, and the one that the answer may open."""
    text = "A stop here</think>yes stop no" if starts else "<think>A stop here</think>yes stop no"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "stop": ["stop"], "max_tokens": 100}
    with (
        running_server(thinking_model if starts else chat_model) as thinking,
        scripted(thinking, text),
        thinking.client() as http,
    ):
        (choice,) = http.post("/v1/chat/completions", json=body).json()["choices"]
        (other,) = http.post("/v1/chat/completions", json={**body, "stop_in_reasoning": True}).json()["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("A stop here", "yes ")
    assert other["message"]["reasoning_content"] == "A " and not other["message"]["content"]
    assert choice["finish_reason"] == other["finish_reason"] == "stop"
