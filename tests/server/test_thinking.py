"""Template arguments and thoughts over HTTP, on a model whose template leaves the thought to the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qnext.errors import UsageError
from qnext.session.folder import open_folder
from qnext.session.served import ServeConfig, load_served
from tests.server.scripts import scripted
from tests.server.serving import Running, running_server

HELLO = [{"role": "user", "content": "Say hi"}]
TEMPLATE = Path(__file__).parents[1] / "text/templates/Qwen-Qwen3-0.6B.jinja"
CLOSED = "<think>\n\n</think>\n\n"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def hybrid_model(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(chat_model, tmp_path_factory.mktemp("served") / "tiny-hybrid"))
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="module")
def hybrid(hybrid_model: Path) -> Iterator[Running]:
    with running_server(hybrid_model) as running:
        yield running


@pytest.fixture(scope="module")
def thinking(thinking_model: Path) -> Iterator[Running]:
    with running_server(thinking_model) as running:
        yield running


def tokens_of(running: Running, path: str, **more: Any) -> tuple[int, Any]:
    """(how many tokens the prompt has, the answer) of a conversation on any surface."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 1},
        "/tokenize": {"messages": HELLO},
        "/v1/responses": {"model": "alias", "input": "Say hi", "max_output_tokens": 1},
        "/v1/messages": {"model": "alias", "messages": HELLO, "max_tokens": 1},
        "/v1/messages/count_tokens": {"model": "alias", "messages": HELLO},
    }
    with running.client() as client:
        answer = client.post(path, json={**bodies[path], **more})
    document = answer.json()
    if answer.status_code != 200:
        return answer.status_code, document
    usage = document.get("usage") or document
    counts = [usage.get(key) for key in ("prompt_tokens", "input_tokens", "count") if usage.get(key) is not None]
    cached = usage.get("cache_read_input_tokens") or 0
    return counts[0] + cached, document


def expected(folder: Path, **arguments: Any) -> int:
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True, **arguments)
    return len(theirs(text, add_special_tokens=False)["input_ids"])


OFF: list[tuple[str, dict[str, Any]]] = [
    *(
        (path, {"chat_template_kwargs": {"enable_thinking": False}})
        for path in ("/v1/chat/completions", "/tokenize", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
    ),
    *((path, {"enable_thinking": False}) for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages")),
    ("/v1/chat/completions", {"reasoning_effort": "none"}),
    ("/v1/chat/completions", {"reasoning_effort": "minimal"}),
    ("/v1/chat/completions", {"reasoning": {"enabled": False}}),
    ("/v1/chat/completions", {"reasoning": {"effort": "none"}}),
    ("/v1/chat/completions", {"thinking": {"type": "disabled"}}),
    ("/tokenize", {"reasoning_effort": "none"}),
    ("/v1/responses", {"reasoning": {"effort": "minimal"}}),
    ("/v1/messages", {"thinking": {"type": "disabled"}}),
    ("/v1/messages/count_tokens", {"thinking": {"type": "disabled"}}),
    ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}),
]
ON: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {}),
    ("/v1/chat/completions", {"reasoning_effort": "low"}),
    ("/v1/chat/completions", {"enable_thinking": None, "chat_template_kwargs": None, "reasoning": None}),
    ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}),
    ("/v1/responses", {"reasoning": {"effort": "high"}}),
    ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("/v1/messages", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}),
]


@pytest.mark.parametrize(("path", "more", "thinks"), [*((*o, False) for o in OFF), *((*o, True) for o in ON)])
def test_every_word_for_it_reaches_the_template(
    hybrid: Running, hybrid_model: Path, path: str, more: dict[str, Any], thinks: bool
) -> None:
    found, document = tokens_of(hybrid, path, **more)
    assert found == expected(hybrid_model, enable_thinking=thinks), document


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("arguments", [{"enable_thinkng": False}, {"messages": []}, {"enable_thinking": "no"}])
def test_what_no_template_reads_is_refused(hybrid: Running, path: str, arguments: dict[str, Any]) -> None:
    status, document = tokens_of(hybrid, path, chat_template_kwargs=arguments)
    assert status == 400 and "enable_thinking" in json.dumps(document)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/responses", "/v1/messages"])
def test_a_template_in_a_request_is_refused(hybrid: Running, path: str) -> None:
    status, document = tokens_of(hybrid, path, chat_template="{{ messages }}")
    assert status == 400 and "chat template" in json.dumps(document)


def chat(running: Running, **more: Any) -> dict[str, Any]:
    with running.client() as client:
        answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 80, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


@pytest.mark.parametrize(
    ("text", "more", "reasoning", "content"),
    [
        ("<think>\nshort\n</think>\n\nHello", {}, "short", "Hello"),
        ("Hello", {}, None, "Hello"),
        ("Say <think> and </think>", {}, None, "Say <think> and </think>"),
        ("<think>x</think>Hello", {"enable_thinking": False}, "x", "Hello"),  # it opens one all the same
        ("<think>\n</think>\n\nHello", {}, None, "Hello"),
        ("<think>\nnever ended", {}, "never ended", None),
    ],
)
def test_a_thought_is_read_where_the_model_may_have_one(
    hybrid: Running, text: str, more: dict[str, Any], reasoning: str | None, content: str | None
) -> None:
    with scripted(hybrid, text):
        message = chat(hybrid, **more)
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)


def test_the_three_surfaces_read_the_same_thought(hybrid: Running, server: Running) -> None:
    for running in (hybrid, server):  # the other template never speaks of thoughts, but its vocabulary does
        with scripted(running, "<think>\nshort\n</think>\n\nHello"), running.client() as client:
            body = {"model": "alias", "max_output_tokens": 80, "input": "Say hi"}
            response = client.post("/v1/responses", json=body).json()
            body = {"model": "alias", "max_tokens": 80, "messages": HELLO}
            message = client.post("/v1/messages", json=body).json()
        assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
        assert [block["type"] for block in message["content"]] == ["thinking", "text"]


def test_a_constraint_waits_for_a_thought_that_the_model_opens(hybrid: Running) -> None:
    ids = hybrid.server.served.tokenizer.added_ids
    opens, ends = str(ids["<think>"]), str(ids["</think>"])
    for bias, more in ((-100, {}), (100, {"enable_thinking": False})):
        silent = chat(hybrid, logit_bias={opens: bias}, temperature=0, guided_choice=["yes"], **more)
        assert silent["content"] == "yes" and "reasoning_content" not in silent
    called = chat(hybrid, logit_bias={opens: 100}, temperature=0, tools=TOOLS, tool_choice="required", max_tokens=9)
    assert called["content"] is None and called["reasoning_content"], "a forced call waits, too"
    message = chat(hybrid, logit_bias={opens: 60, ends: 90}, temperature=0, guided_choice=["yes"])
    assert message["content"] == "yes"


def test_a_choice_that_holds_a_thought(hybrid: Running) -> None:
    message = chat(hybrid, guided_choice=["<think>\nhm\n</think>\n\nok"])
    assert (message["reasoning_content"], message["content"]) == ("hm", "ok")


@pytest.mark.parametrize(
    ("begun", "ending"),
    [
        ({"content": "Well"}, "assistant\nWell"),
        ({"content": "Well", "reasoning_content": "hm"}, "assistant\n<think>\nhm\n</think>\n\nWell"),
        ({"content": "<think>\nhm"}, "assistant\n<think>\nhm"),
    ],
)
def test_a_turn_that_has_begun(hybrid: Running, thinking: Running, begun: dict[str, str], ending: str) -> None:
    body = {"messages": [*HELLO, {"role": "assistant", **begun}], "continue_final_message": True}
    for running in (hybrid, thinking):
        with running.client() as client:
            ids = client.post("/tokenize", json=body).json()["tokens"]
            text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        closed = "" if "<think>" in ending or running is hybrid else "<think>\n\n</think>\n\n"
        assert text.endswith(ending.replace("Well", closed + "Well"))
    with scripted(hybrid, " so.</think>Yes"):
        message = chat(hybrid, **body)
    assert message["content"] == ("Yes" if begun["content"].startswith("<think>") else " so.</think>Yes")


@pytest.mark.parametrize("choice", ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}])
def test_tokenize_counts_the_prompt_of_chat(hybrid: Running, server: Running, choice: Any) -> None:
    for running in (hybrid, server):
        for more in ({}, {"enable_thinking": False}, {"add_generation_prompt": False}):
            body = {"tools": TOOLS, "tool_choice": choice, **more}
            counted, _ = tokens_of(running, "/tokenize", **body)
            assert counted == tokens_of(running, "/v1/chat/completions", **body)[0]


def test_what_a_template_reads_is_published(hybrid: Running, server: Running, thinking: Running) -> None:
    for running, read, facts in (
        (hybrid, ["enable_thinking"], {"by_default": False, "has_switch": True}),
        (server, [], {"by_default": False, "has_switch": False}),
        (thinking, [], {"by_default": True, "has_switch": False}),
    ):
        with running.client() as client:
            assert client.get("/v1/models").json()["data"][0]["chat_template_kwargs"] == read
            info = client.get("/tokenizer_info").json()
        assert info["thinking"] == facts and set(read) <= set(info["chat_template_kwargs"])


def test_a_server_may_have_arguments_of_its_own(hybrid_model: Path) -> None:
    def served(arguments: dict[str, Any]) -> Any:
        config = ServeConfig(["m"], {"max_num_seqs": 1}, template_defaults=arguments)
        return load_served(open_folder(str(hybrid_model)), config)[1]

    model = served({"enable_thinking": False})
    assert not model.is_thinking and model.is_hybrid
    with pytest.raises(UsageError, match="reads no argument 'nope'"):
        served({"nope": 1})


MALFORMED = ['{"text": "abc', "null", "", None, [], ["a"], 7, True, '"x"']


@pytest.mark.parametrize("arguments", MALFORMED, ids=map(repr, MALFORMED))
def test_malformed_arguments_of_the_past_end_nothing(hybrid: Running, arguments: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c", "content": "bad"}
    turns = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result, *HELLO]
    items = [
        *HELLO,
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": "bad"},
        *HELLO,
    ]
    blocks = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": arguments}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "bad"}]},
    ]
    for path, more in (
        ("/v1/chat/completions", {"messages": turns}),
        ("/v1/responses", {"input": items}),
        ("/v1/messages", {"messages": blocks}),
    ):
        with hybrid.client() as client:
            body = {"model": "alias", "max_tokens": 1, "max_output_tokens": 1, "tools": [], **more}
            assert client.post(path, json=body).status_code == 200


@pytest.mark.parametrize(
    ("text", "num_reasoning"),
    [
        ("<think>\nabc\n</think>\n\nHello", 7),  # both marks, the letters and the newlines between them
        ("<think>abc", 5),  # and the token that ends the answer
        ("Hello", 0),
        ("Say <think> and </think>", 0),
        ("<think></think>Hi", 2),
    ],
)
def test_tokens_of_a_thought_that_the_model_opens_are_counted(hybrid: Running, text: str, num_reasoning: int) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": HELLO, "max_tokens": 80},
        "/v1/responses": {"input": "hi", "max_output_tokens": 80},
        "/v1/messages": {"model": "alias", "messages": HELLO, "max_tokens": 80},
    }
    with scripted(hybrid, text), hybrid.client() as client:
        used = {path: client.post(path, json=body).json()["usage"] for path, body in bodies.items()}
    assert used["/v1/chat/completions"]["completion_tokens_details"]["reasoning_tokens"] == num_reasoning
    assert used["/v1/responses"]["output_tokens_details"]["reasoning_tokens"] == num_reasoning
    assert used["/v1/messages"]["output_tokens_details"]["thinking_tokens"] == num_reasoning
