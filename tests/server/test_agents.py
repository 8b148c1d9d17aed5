"""What agents, editors and libraries send beside text and functions, on the surfaces where they send it."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx2
import jsonschema
import openai
import pytest

from qnext.server.tools import Collected, Origin
from tests.server.scripts import named_events, recorded_prompts, scripted
from tests.server.serving import CONTEXT, Running
from tests.server.test_chat import chunks

LOOK = {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"max_tokens": 2}, RESPONSES: {"max_output_tokens": 2}, MESSAGES: {"max_tokens": 2, "model": "alias"},
}  # fmt: skip


def post(server: Running, path: str, **body: Any) -> httpx2.Response:
    with server.client() as client:
        return client.post(path, json={**BASE.get(path, {}), **body}, timeout=60.0)


def prompt_of(server: Running, path: str, **body: Any) -> str:
    with recorded_prompts(server) as prompts:
        answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text
    return prompts[-1]


def ignored(answer: httpx2.Response) -> set[str]:
    assert answer.status_code == 200, answer.text
    return set(filter(None, answer.headers.get("x-qnext-ignored", "").split(", ")))


# ---- tools of other kinds ----

PATCH = {"type": "custom", "name": "apply_patch", "description": "Edit files",
         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}}  # fmt: skip
FIND = {"type": "function", "name": "find", "parameters": LOOK}
SPACE = {"type": "namespace", "name": "mcp__notes", "description": "Notes", "tools": [FIND, {**FIND, "name": "add"}]}
# A tool of the responses API, what the model calls, with which arguments, and what the client gets.
TRANSLATED: list[tuple[Any, str, dict[str, Any], dict[str, Any]]] = [
    (PATCH, "apply_patch", {"input": "*** Begin"},
     {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin"}),
    (SPACE, "mcp__notes__find", {"q": "x"},
     {"type": "function_call", "namespace": "mcp__notes", "name": "find", "arguments": '{"q": "x"}'}),
    ({**SPACE, "name": "functions"}, "add", {"q": "x"},
     {"type": "function_call", "namespace": "functions", "name": "add"}),
    ({"type": "local_shell"}, "local_shell", {"command": ["ls", "-l"]},
     {"type": "local_shell_call", "action": {"type": "exec", "env": {}, "command": ["ls", "-l"]}}),
    ({"type": "shell", "environment": {"type": "local"}}, "shell", {"commands": ["ls"]},
     {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None}}),
    ({"type": "apply_patch"}, "apply_patch", {"type": "delete_file", "path": "a"},
     {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}}),
    ({"type": "tool_search", "execution": "client", "description": "Find", "parameters": LOOK}, "tool_search",
     {"q": "notes"}, {"type": "tool_search_call", "execution": "client", "arguments": {"q": "notes"}}),
]  # fmt: skip


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


@pytest.mark.parametrize(("tool", "name", "arguments", "expected"), TRANSLATED, ids=lambda value: str(value)[:30])
def test_tools_that_clients_run_come_back_in_their_form(
    server: Running, tool: Any, name: str, arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    body = {"input": "go", "tools": [tool], "max_output_tokens": 400}
    with scripted(server, call_text(name, arguments)):
        whole = post(server, RESPONSES, **body)
        events = named_events(post(server, RESPONSES, **body, stream=True))
    assert not ignored(whole)
    (item,) = whole.json()["output"]
    assert {**item, **expected} == item and item["call_id"] and item["status"] == "completed"
    (last,) = events[-1]["response"]["output"]
    assert {**last, **expected} == last
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == [last]
    # And what it sends back with its result is read as the same call.
    output = {"custom_tool_call": "custom_tool_call_output", "function_call": "function_call_output"}.get(
        item["type"], f"{item['type']}_output".replace("tool_search_call_output", "tool_search_output")
    )
    result: dict[str, Any] = {"type": output, "call_id": item["call_id"]}
    result |= {"tools": [SPACE]} if output == "tool_search_output" else {"output": "it went well"}
    if output == "shell_call_output":
        result["output"] = [{"stdout": "it went well", "stderr": "", "outcome": {"type": "exit", "exit_code": 2}}]
    prompt = prompt_of(server, RESPONSES, input=[{"role": "user", "content": "go"}, item, result], tools=[tool])
    kept = {key: value for key, value in arguments.items() if key != "type"}
    assert f'"name": "{name}"' in prompt.split("<|im_start|>user")[-2]
    assert all(json.dumps(value) in prompt for value in kept.values())
    assert ("mcp__notes__find" if "tools" in result else "it went well") in prompt


@pytest.mark.parametrize(
    ("path", "tool"),
    [
        (RESPONSES, {"type": "web_search", "external_web_access": False}),
        (RESPONSES, {"type": "file_search", "vector_store_ids": ["a"]}),
        (RESPONSES, {"type": "mcp", "server_label": "x", "server_url": "https://x.example"}),
        (RESPONSES, {"type": "shell", "environment": {"type": "container_auto"}}),
        (RESPONSES, {"type": "tool_search"}),
        (RESPONSES, {"type": "something_of_tomorrow", "name": "x"}),
        (CHAT, {"type": "web_search_preview"}),
        (MESSAGES, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}),
        (MESSAGES, {"type": "computer_toolset_20260801"}),
        (MESSAGES, {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}),
    ],
    ids=str,
)
def test_tools_that_servers_run_are_passed_over_and_named(server: Running, path: str, tool: dict[str, Any]) -> None:
    asked = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    answer = post(server, path, **asked, tools=[tool])
    assert ignored(answer) == {tool["type"]}
    assert prompt_of(server, path, **asked, tools=[tool]) == prompt_of(server, path, **asked)


@pytest.mark.parametrize(
    ("kind", "name", "parameter"),
    [("bash_20250124", "bash", "restart"), ("text_editor_20250728", "str_replace_based_edit_tool", "insert_line"),
     ("text_editor_20250124", "str_replace_editor", "view_range"), ("memory_20250818", "memory", "new_path")],
)  # fmt: skip
def test_tools_of_anthropic_that_clients_run(server: Running, kind: str, name: str, parameter: str) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": kind, "name": name}]}
    prompt = prompt_of(server, MESSAGES, **body)
    assert f'"name": "{name}"' in prompt and f'"{parameter}"' in prompt
    body |= {"tool_choice": {"type": "tool", "name": name}, "max_tokens": 600, "temperature": 0}
    (block,) = post(server, MESSAGES, **body).json()["content"]
    assert block["type"] == "tool_use" and block["name"] == name and isinstance(block["input"], dict)


def test_a_custom_tool_of_chat(server: Running) -> None:
    tool = {"type": "custom", "custom": {"name": "sql", "format": {"type": "text"}}}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool], "max_tokens": 400}
    with scripted(server, call_text("sql", {"input": "select 1"})):
        choice = post(server, CHAT, **body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "custom" and call["custom"] == {"name": "sql", "input": "select 1"}
    history = [*body["messages"], choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "1 row"}]
    assert '"arguments": {"input": "select 1"}' in prompt_of(server, CHAT, messages=history, tools=[tool])
    forced = post(server, CHAT, **body, tool_choice={"type": "custom", "custom": {"name": "sql"}}, temperature=0)
    assert forced.json()["choices"][0]["finish_reason"] in ("tool_calls", "length")


def test_functions_are_the_older_form_of_tools(server: Running) -> None:
    function = {"name": "look", "parameters": LOOK}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "functions": [function], "max_tokens": 400}
    with scripted(server, call_text("look", {"q": "x"})):
        choice = post(server, CHAT, **body).json()["choices"][0]
        found = chunks(post(server, CHAT, **body, stream=True))
    assert choice["message"]["function_call"] == {"name": "look", "arguments": '{"q": "x"}'}
    assert choice["finish_reason"] == "function_call" and "tool_calls" not in choice["message"]
    deltas = [chunk["choices"][0]["delta"] for chunk in found if chunk["choices"]]
    assert (
        "".join(delta["function_call"].get("arguments", "") for delta in deltas if "function_call" in delta)
        == '{"q": "x"}'
    )
    history = [*body["messages"], choice["message"], {"role": "function", "name": "look", "content": "grey"}]
    of_tools = [
        *body["messages"],
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": choice["message"]["function_call"]}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "grey"},
    ]
    tools = [{"type": "function", "function": function}]
    assert prompt_of(server, CHAT, messages=history, functions=[function]) == prompt_of(
        server, CHAT, messages=of_tools, tools=tools
    )
    assert post(server, CHAT, **body, tools=tools).status_code == 400
    assert post(server, CHAT, **{**body, "functions": None}, function_call="auto").status_code == 400
    none = post(server, CHAT, **body, function_call="none")
    assert "function_call" not in none.json()["choices"][0]["message"]


def test_a_name_may_come_twice_in_different_namespaces_or_with_the_same_tool() -> None:
    found = Collected()
    found.add("a__f", "d", LOOK, origin=Origin("function", "f", "a"))
    found.add("b__f", "d", LOOK, origin=Origin("function", "f", "b"))
    found.add("f", "d", LOOK)
    found.add("f", "d", LOOK)
    offer = found.offered({"type": "function", "name": "f", "namespace": "b"})
    assert [tool["function"]["name"] for tool in offer.tools] == ["a__f", "b__f", "f"] and offer.name == "b__f"


@pytest.mark.parametrize("name", ["mcp__x__y.z/w", "a:b", "f" * 128, "größe", "ns@1~x", "get-$ref#1"])
def test_names_of_tools_as_servers_write_them(server: Running, name: str) -> None:
    tool = {"type": "function", "function": {"name": name, "parameters": LOOK}}
    with scripted(server, call_text(name, {"q": "x"})):
        answer = post(server, CHAT, messages=[{"role": "user", "content": "hi"}], tools=[tool], max_tokens=400)
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": name, "arguments": '{"q": "x"}'}


# ---- a call or an answer of a form ----

FORM = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": FORM}}


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"tools": [TOOL],
                "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": FORM}}}),
        (CHAT, {"tools": [TOOL], "response_format": {"type": "json_object"}}),
        (CHAT, {"tools": [TOOL], "guided_choice": ["{}"]}),
        (CHAT, {"tools": [TOOL], "grammar": 'root ::= "{}"'}),
        (RESPONSES, {"tools": [{"type": "function", **TOOL["function"]}],  # type: ignore[dict-item]
                     "text": {"format": {"type": "json_schema", "name": "f", "schema": FORM}}}),
        (MESSAGES, {"tools": [{"name": "look", "input_schema": FORM}],
                    "output_config": {"format": {"type": "json_schema", "schema": FORM}}}),
    ],
    ids=str,
)  # fmt: skip
def test_beside_a_format_a_call_stays_possible(server: Running, path: str, more: dict[str, Any]) -> None:
    tags = server.server.served.tokenizer.added_ids
    seen: list[Any] = []
    guide = server.server.guide

    async def watched(constraint: Any, *, param: str, owner: str) -> Any:
        seen.append(state := await guide(constraint, param=param, owner=owner))
        return state

    asked = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.server, "guide", watched)
        assert post(server, path, **asked, **more).status_code == 200
        assert post(server, path, **asked, **{**more, "tools": []}).status_code == 200
    with_tools, without = (state.copy() for state in seen)
    with_tools.rollback(with_tools.num_tokens)
    without.rollback(without.num_tokens)
    brace = server.server.served.tokenizer.encode("{")[0]
    assert with_tools.allows(tags["<tool_call>"]) and with_tools.allows(brace)
    assert not without.allows(tags["<tool_call>"]) and without.allows(brace)
    assert not with_tools.allows(server.server.served.tokenizer.encode("x")[0])


def test_strict_is_held_where_a_call_is_forced(server: Running) -> None:
    loose = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "maxItems": 1}}}
    function = {"name": "f", "parameters": loose}
    ask = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "temperature": 0}
    strict = {"type": "function", "function": {**function, "strict": True}}
    assert post(server, CHAT, **ask, tools=[strict]).status_code == 200
    answer = post(server, CHAT, **ask, tools=[strict], tool_choice="required")
    assert answer.status_code == 400 and "properties.a.uniqueItems" in answer.json()["error"]["message"]
    relaxed = post(server, CHAT, **ask, tools=[{"type": "function", "function": function}], tool_choice="required")
    (call,) = relaxed.json()["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), loose)


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
    (MESSAGES, {"role": "assistant", "content": [
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "weather"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": [
            {"type": "web_search_result", "title": "Grey", "encrypted_content": "XYZ"}]}]}, "Grey"),
    (MESSAGES, {"role": "user", "content": [{"type": "document", "title": "a.pdf", "source": {"type": "base64"}}]},
     "[document a.pdf: "),
    (MESSAGES, {"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "plain"}}]},
     "plain"),
    (MESSAGES, {"role": "user", "content": [{"type": "search_result", "source": "s", "title": "t",
                                            "content": [{"type": "text", "text": "found"}]}]}, "found"),
    (MESSAGES, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, ""),
    (MESSAGES, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "gone", "content": [
        {"type": "image", "source": {}}, {"type": "tool_reference", "tool_name": "Read"}]}]}, "[tool: Read]"),
    (MESSAGES, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": None}]}, '"f"'),
    (MESSAGES, {"role": "assistant", "content": [{"type": "container_upload", "file_id": "f"}]}, "[file: "),
]  # fmt: skip


@pytest.mark.parametrize(("path", "turn", "text"), PAST, ids=lambda value: str(value)[:60])
def test_the_past_is_read_as_far_as_it_can_be(server: Running, path: str, turn: Any, text: str) -> None:
    turns = [{"role": "user", "content": "Begin."}, turn, {"role": "user", "content": "Go on."}]
    prompt = prompt_of(server, path, **{"input" if path == RESPONSES else "messages": turns})
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
    answer = post(server, path, **{"input" if path == RESPONSES else "messages": turns})
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
        prompts.append(prompt_of(server, path, **more, **{"input" if path == RESPONSES else "messages": turns}))
    assert prompts[0] == prompts[1] and RULES in prompts[0] and "cch=a1" not in prompts[0]
    assert LINE in prompts[0], "what the user says stays"


@pytest.mark.parametrize("times", [1, 20])
def test_what_is_too_long_is_said_in_the_words_that_agents_know(server: Running, times: int) -> None:
    text = "a b c d " * (CONTEXT // 6) * times
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": text}]}), (RESPONSES, {"input": text}),
        (MESSAGES, {"messages": [{"role": "user", "content": text}]}), ("/v1/completions", {"prompt": text}),
    ]  # fmt: skip
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


@pytest.mark.parametrize(
    "name", ["claude-opus-5", "claude-haiku-4-5-20251001", "anthropic/claude-x", "anthropic.claude-y"]
)
def test_names_of_claude_are_served_by_the_one_model(server: Running, name: str) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)
    message = client.messages.create(model=name, max_tokens=2, messages=[{"role": "user", "content": "hi"}])
    assert message.model == "tiny-chat"
    with server.client() as plain:
        assert plain.get(f"/v1/models/{name}").status_code == 200


@pytest.mark.parametrize("name", ["gpt-5", "claude", "other", "xclaude-1", ""])
def test_other_names_stay_unknown(server: Running, name: str) -> None:
    assert post(server, CHAT, model=name, messages=[{"role": "user", "content": "hi"}]).status_code == 404


def test_health_as_other_servers_have_it(server: Running) -> None:
    with server.client() as client:
        for answer in (client.get("/health"), client.head("/health")):
            assert answer.status_code == 200 and answer.content == b""


# ---- fields ----


@pytest.mark.parametrize(
    ("path", "more", "expected"),
    [
        (CHAT, {"store": True, "service_tier": "flex", "user": "u"}, {"store", "service_tier", "user"}),
        (CHAT, {"store": False, "service_tier": "auto", "user": None, "modalities": ["text"]}, set()),
        (CHAT, {"mirostat": 0, "typical_p": 1.0, "xtc_probability": 0, "tfs_z": 1}, set()),
        (CHAT, {"mirostat": 2, "something_new": [1]}, {"mirostat", "something_new"}),
        (CHAT, {"x y": 1, "": 2, "a\nb": 3, "X" * 65: 4}, {"a-field-of-another-name"}),
        (RESPONSES, {"store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k"},
         {"include", "prompt_cache_key"}),
        (RESPONSES, {"text": {"verbosity": "low"}, "reasoning": {"summary": "detailed"}, "truncation": "auto"},
         {"text.verbosity", "reasoning.summary", "truncation"}),
        (MESSAGES, {"metadata": {"user_id": "u"}, "context_management": {"edits": []}, "mcp_servers": [{"url": "x"}]},
         {"metadata", "context_management", "mcp_servers"}),
        (MESSAGES, {"metadata": None, "service_tier": "auto", "thinking": None}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)  # fmt: skip
def test_fields_without_effect_are_named(server: Running, path: str, more: dict[str, Any], expected: set[str]) -> None:
    asked = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    assert ignored(post(server, path, **asked, **more)) == expected


@pytest.mark.parametrize(
    "more",
    [{"use_beam_search": True}, {"truncate_prompt_tokens": 5}, {"logits_processors": ["x"]}, {"audio": {"voice": "a"}},
     {"include_stop_str_in_output": True}, {"n_predict": 5}, {"echo": True}, {"prompt_logprobs": 1, "stream": True}],
    ids=str,
)  # fmt: skip
def test_fields_that_would_change_the_answer_are_refused(server: Running, more: dict[str, Any]) -> None:
    answer = post(server, CHAT, messages=[{"role": "user", "content": "hi"}], **more)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(more))
    neutral = dict.fromkeys(more)
    assert post(server, CHAT, messages=[{"role": "user", "content": "hi"}], **neutral).status_code == 200


def test_log_probabilities_of_a_chats_prompt(server: Running) -> None:
    answer = post(
        server, CHAT, messages=[{"role": "user", "content": "hi"}], prompt_logprobs=2, return_token_ids=True
    ).json()
    ids, found = answer["prompt_token_ids"], answer["prompt_logprobs"]
    assert len(found) == len(ids) and found[0] is None
    for token, entries in zip(ids[1:], found[1:], strict=True):
        assert 2 <= len(entries) <= 3 and str(token) in entries
        by_rank = sorted(entries.values(), key=lambda entry: entry["rank"])
        assert [entry["rank"] for entry in by_rank[:2]] == [1, 2]
        assert [entry["logprob"] for entry in by_rank] == sorted((e["logprob"] for e in by_rank), reverse=True)
    whole = post(server, "/v1/completions", prompt=ids, max_tokens=1, prompt_logprobs=2).json()["choices"][0]
    assert whole["prompt_logprobs"] == found


def test_tokens_as_ids_in_chat(server: Running) -> None:
    ask = {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 1,
        "return_token_ids": True,
    }
    choice = post(server, CHAT, **ask, return_tokens_as_token_ids=True, max_tokens=5).json()["choices"][0]
    names = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert names == [f"token_id:{token}" for token in choice["token_ids"]][: len(names)] and names
    assert all(entry["top_logprobs"][0]["token"].startswith("token_id:") for entry in choice["logprobs"]["content"])


def test_the_official_client_reads_custom_calls_and_namespaces(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with scripted(server, call_text("apply_patch", {"input": "x"}) + "\n" + call_text("mcp__notes__find", {"q": "y"})):
        response = client.responses.create(model="alias", input="hi", tools=[PATCH, SPACE], max_output_tokens=400)  # type: ignore[list-item]
    custom, function = response.output
    assert custom.type == "custom_tool_call" and custom.input == "x"
    assert function.type == "function_call" and function.namespace == "mcp__notes" and function.name == "find"
