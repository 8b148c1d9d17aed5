"""What stands in the conversations of agents beside text, and what is too long in them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.server.agents import CHAT, MESSAGES, RESPONSES, ignored, post, prompt_of, turns_of
from tests.server.scripts import named_events
from tests.server.serving import CONTEXT, Running

# ---- history ----


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_tools_that_are_far_too_long_are_counted_in_tokens(server: Running, path: str) -> None:
    """The words by which agents know that they must compact."""
    long = "word " * 8 * CONTEXT
    tool: dict[str, Any] = {"name": "f", "description": long}
    if path == CHAT:
        tool = {"type": "function", "function": tool}
    tool |= {"type": "function"} if path == RESPONSES else {"input_schema": {}} if path == MESSAGES else {}
    ask = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    answer = post(server, path, **ask, tools=[tool])
    assert answer.status_code == 400
    assert re.search(
        rf"prompt is too long: at least \d+ tokens > {CONTEXT - 1} maximum", answer.json()["error"]["message"]
    )


PAST: list[tuple[str, Any, str]] = [
    (RESPONSES, {"type": "web_search_call", "id": "ws_1", "action": {"query": "weather"}}, "weather"),
    (RESPONSES, {"type": "item_reference", "id": "msg_1"}, "another server"),
    (RESPONSES, {"type": "compaction", "encrypted_content": "abc"}, "another server"),
    (RESPONSES, {"type": "mcp_call", "id": "m", "name": "ask", "arguments": "{}", "output": "42"}, "42"),
    (RESPONSES, {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": []}, ""),
    (RESPONSES, {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "abc"}, ""),
    (RESPONSES, {"type": "function_call_output", "call_id": "gone", "output": "orphan"}, "orphan"),
    (RESPONSES, {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}, "[image: "),
    (RESPONSES, {"role": "user", "content": [{"type": "input_file", "filename": "a.pdf"}]}, "[file a.pdf: "),
    (RESPONSES, {"role": "assistant", "content": None}, ""),
    (RESPONSES, {"type": "ghost_snapshot", "ghost_commit": {"id": "abc"}}, ""),
    (RESPONSES, {"type": "not_yet_invented", "text": "abc"}, ""),
    (RESPONSES, {"role": "user", "content": [{"type": "input_hologram", "text": "seen"}]}, "seen"),
    (CHAT, {"role": "user", "content": [{"type": "hologram", "data": "XYZ"}]}, "[hologram]"),
    (MESSAGES, {"role": "user", "content": [{"type": "hologram", "title": "seen"}]}, "seen"),
    (CHAT, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "[image: "),
    (CHAT, {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}, "[audio: "),
    (CHAT, {"role": "assistant", "content": None, "refusal": "I will not."}, "I will not."),
    (CHAT, {"role": "tool", "tool_call_id": "gone", "content": [{"type": "image_url"}]}, "[image: "),
    (CHAT, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
    (
        MESSAGES,
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "weather"}},
                {
                    "type": "web_search_tool_result",
                    "tool_use_id": "s",
                    "content": [{"type": "web_search_result", "title": "Grey", "encrypted_content": "XYZ"}],
                },
            ],
        },
        "Grey",
    ),
    (
        MESSAGES,
        {"role": "user", "content": [{"type": "document", "title": "a.pdf", "source": {"type": "base64"}}]},
        "[document a.pdf: ",
    ),
    (
        MESSAGES,
        {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "plain"}}]},
        "plain",
    ),
    (
        MESSAGES,
        {
            "role": "user",
            "content": [
                {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "found"}]}
            ],
        },
        "found",
    ),
    (MESSAGES, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, ""),
    (
        MESSAGES,
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "gone",
                    "content": [{"type": "image", "source": {}}, {"type": "tool_reference", "tool_name": "Read"}],
                }
            ],
        },
        "[tool: Read]",
    ),
    (MESSAGES, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": None}]}, '"f"'),
    (MESSAGES, {"role": "assistant", "content": [{"type": "container_upload", "file_id": "f"}]}, "[file: "),
]


@pytest.mark.parametrize(("path", "turn", "text"), PAST, ids=lambda value: str(value)[:60])
def test_the_past_is_read_as_far_as_it_can_be(server: Running, path: str, turn: Any, text: str) -> None:
    turns = [{"role": "user", "content": "Begin."}, turn, {"role": "user", "content": "Go on."}]
    prompt = prompt_of(server, path, **turns_of(path, turns))
    assert text in prompt and "Go on." in prompt and "XYZ" not in prompt and "abc" not in prompt


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (CHAT, [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:"}}]),
        (CHAT, [{"type": "file", "file": {"filename": "a.pdf"}}]),
        (RESPONSES, [{"type": "input_image", "image_url": "data:"}]),
        (MESSAGES, [{"type": "image", "source": {"type": "base64"}}]),
        (MESSAGES, [{"type": "document", "source": {"type": "url"}}]),
    ],
    ids=str,
)
def test_the_question_of_now_is_refused_where_it_cannot_be_read(server: Running, path: str, content: Any) -> None:
    turns = [{"role": "user", "content": content}]
    answer = post(server, path, **turns_of(path, turns))
    assert answer.status_code == 400 and "reads text only" in answer.json()["error"]["message"]


def test_a_picture_that_a_tool_gave_last_is_passed_over_and_named(server: Running) -> None:
    turns = [
        {"role": "user", "content": "Look at a.png"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "Read", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}]},
    ]
    assert ignored(post(server, MESSAGES, messages=turns)) == {"image"}


# ---- lines that change, words of overflow, names ----

LINE = "x-anthropic-billing-header: cc_version=2.1.100.{0}; cc_entrypoint=cli; cch={0};"
RULES = "Rules of the house."


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (MESSAGES, lambda line: {"system": [{"type": "text", "text": line}, {"type": "text", "text": RULES}]}),
        (MESSAGES, lambda line: {"system": f"{line}\n{RULES}"}),
        (MESSAGES, lambda line: {"system": [{"type": "text", "text": f"{line}\n{RULES}"}]}),
        (MESSAGES, lambda line: {"system": f"{RULES}\n{line}"}),
        (CHAT, lambda line: {"system": [{"role": "system", "content": f"{line}\n{RULES}"}]}),
        (CHAT, lambda line: {"system": [{"role": "system", "content": line}, {"role": "developer", "content": RULES}]}),
        (
            CHAT,
            lambda line: {"system": [{"role": "system", "content": [{"type": "text", "text": f"{line}\n{RULES}"}]}]},
        ),
        (RESPONSES, lambda line: {"instructions": f"{line}\n{RULES}"}),
        (RESPONSES, lambda line: {"system": [{"role": "developer", "content": f"{line}\n{RULES}"}]}),
    ],
)
def test_a_line_that_changes_with_every_request_is_not_of_the_prompt(server: Running, path: str, place: Any) -> None:
    prompts = []
    for line in (LINE.format("a1"), LINE.format("b2")):
        more = place(line)
        turns = [*(more.pop("system", []) if path != MESSAGES else []), {"role": "user", "content": f"hi {LINE}"}]
        prompts.append(prompt_of(server, path, **more, **turns_of(path, turns)))
    assert prompts[0] == prompts[1] and RULES in prompts[0] and "cch=a1" not in prompts[0]
    assert LINE in prompts[0], "what the user says stays"


@pytest.mark.parametrize("times", [1, 20])
def test_what_is_too_long_is_said_in_the_words_that_agents_know(server: Running, times: int) -> None:
    text = "a b c d " * (CONTEXT // 6) * times
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        (RESPONSES, {"input": text}),
        (MESSAGES, {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
    ]
    for path, body in bodies:
        answer = post(server, path, **body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error"
        words = error["message"].removeprefix("messages: ")
        assert words.startswith("prompt is too long: ") and f"> {CONTEXT - 1} maximum" in words
        number = int(words.removeprefix("prompt is too long: ").removeprefix("at least ").split()[0])
        assert CONTEXT <= number <= len(text) + 50
        assert ("at least" in words) == (times > 1)
        if path != MESSAGES:
            assert error["code"] == "context_length_exceeded"
    count = post(server, "/tokenize", prompt="a b c d " * (CONTEXT // 6)).json()["count"]
    exact = post(server, "/v1/completions", prompt="a b c d " * (CONTEXT // 6)).json()["error"]["message"]
    assert f": {count} tokens" in exact


def test_a_stream_of_responses_fails_with_the_code_that_codex_knows(server: Running) -> None:
    events = named_events(post(server, RESPONSES, input="a" * 3 * CONTEXT, stream=True))
    assert [event["type"] for event in events] == ["response.created", "response.failed"]
    error = events[-1]["response"]["error"]
    assert error["code"] == "context_length_exceeded" and error["message"].startswith("prompt is too long")
