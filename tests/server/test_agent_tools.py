"""Tools that are no functions, older forms of tools, and calls beside a format."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from qnext.server.surfaces.tools import Collected, Origin
from tests.server.agents import CHAT, LOOK, MESSAGES, RESPONSES, call_text, ignored, post, prompt_of
from tests.server.scripts import named_events, scripted
from tests.server.serving import Running
from tests.server.test_chat import chunks

# ---- tools of other kinds ----

PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
FIND = {"type": "function", "name": "find", "parameters": LOOK}
SPACE = {"type": "namespace", "name": "mcp__notes", "description": "Notes", "tools": [FIND, {**FIND, "name": "add"}]}
# A tool of the responses API, what the model calls, with which arguments, and what the client gets.
TRANSLATED: list[tuple[Any, str, dict[str, Any], dict[str, Any]]] = [
    (
        PATCH,
        "apply_patch",
        {"input": "*** Begin"},
        {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin"},
    ),
    (
        SPACE,
        "mcp__notes__find",
        {"q": "x"},
        {"type": "function_call", "namespace": "mcp__notes", "name": "find", "arguments": '{"q": "x"}'},
    ),
    (
        {**SPACE, "name": "functions"},
        "add",
        {"q": "x"},
        {"type": "function_call", "namespace": "functions", "name": "add"},
    ),
    (
        {"type": "local_shell"},
        "local_shell",
        {"command": ["ls", "-l"]},
        {"type": "local_shell_call", "action": {"type": "exec", "env": {}, "command": ["ls", "-l"]}},
    ),
    (
        {"type": "shell", "environment": {"type": "local"}},
        "shell",
        {"commands": ["ls"]},
        {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": None, "max_output_length": None}},
    ),
    (
        {"type": "apply_patch"},
        "apply_patch",
        {"type": "delete_file", "path": "a"},
        {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}},
    ),
    (
        {"type": "tool_search", "execution": "client", "description": "Find", "parameters": LOOK},
        "tool_search",
        {"q": "notes"},
        {"type": "tool_search_call", "execution": "client", "arguments": {"q": "notes"}},
    ),
]


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
    [
        ("bash_20250124", "bash", "restart"),
        ("text_editor_20250728", "str_replace_based_edit_tool", "insert_line"),
        ("text_editor_20250124", "str_replace_editor", "view_range"),
        ("memory_20250818", "memory", "new_path"),
    ],
)
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
        (
            CHAT,
            {"tools": [TOOL], "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": FORM}}},
        ),
        (CHAT, {"tools": [TOOL], "response_format": {"type": "json_object"}}),
        (CHAT, {"tools": [TOOL], "guided_choice": ["{}"]}),
        (CHAT, {"tools": [TOOL], "grammar": 'root ::= "{}"'}),
        (
            RESPONSES,
            {
                "tools": [{"type": "function", **TOOL["function"]}],  # type: ignore[dict-item]
                "text": {"format": {"type": "json_schema", "name": "f", "schema": FORM}},
            },
        ),
        (
            MESSAGES,
            {
                "tools": [{"name": "look", "input_schema": FORM}],
                "output_config": {"format": {"type": "json_schema", "schema": FORM}},
            },
        ),
    ],
    ids=str,
)
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
    loosely = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    relaxed = post(server, CHAT, **ask, **loosely, parallel_tool_calls=False)
    (call,) = relaxed.json()["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), loose)


def test_the_official_client_reads_custom_calls_and_namespaces(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with scripted(server, call_text("apply_patch", {"input": "x"}) + "\n" + call_text("mcp__notes__find", {"q": "y"})):
        response = client.responses.create(model="alias", input="hi", tools=[PATCH, SPACE], max_output_tokens=400)  # type: ignore[list-item]
    custom, function = response.output
    assert custom.type == "custom_tool_call" and custom.input == "x"
    assert function.type == "function_call" and function.namespace == "mcp__notes" and function.name == "find"
