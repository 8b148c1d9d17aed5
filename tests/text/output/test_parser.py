"""What an answer is read as: one example and more for each rule."""

from __future__ import annotations

import json

import pytest

from qnext.text.output import Call, Content, OutputParser, Reasoning
from qnext.text.output import parser as parser_module
from tests.text.output.outputs import TOOLS, json_call, read, xml_call

TIME = Call("time", "{}")


def test_text_comes_out_at_once() -> None:
    parser = OutputParser(tool_style="json", tools=TOOLS)
    assert parser.push("Hello") == [Content("Hello")]
    assert parser.push(" wor") == [Content(" wor")]
    assert parser.push("ld <") == [Content("ld")]
    assert parser.push("tool") == []
    assert parser.push("box>") == [Content(" <toolbox>")]
    assert parser.finish() == []
    assert parser.num_calls == 0


def test_a_call_comes_out_when_it_is_complete() -> None:
    parser = OutputParser(tool_style="json", tools=TOOLS)
    text = json_call("time", "{}")
    assert parser.push("Wait.\n" + text[:-1]) == [Content("Wait.")]
    assert parser.num_calls == 0
    assert parser.push(text[-1]) == [TIME]
    assert parser.num_calls == 1
    assert parser.push("\n" + text) == [TIME]
    assert parser.num_calls == 2
    assert parser.push("\n") == parser.finish() == []


def test_without_tools_tags_are_text() -> None:
    for text in (json_call("time", "{}"), xml_call("time"), "a \n"):
        assert read([text], tool_style=None) == [Content(text)]
        assert OutputParser(tool_style=None).push(text) == [Content(text)]


def test_each_style_reads_its_own_calls() -> None:
    assert read([json_call("time", "{}")], tool_style="xml") == [Content(json_call("time", "{}"))]
    assert read([xml_call("time")], tool_style="json") == [Content(xml_call("time"))]
    assert read([xml_call("time")], tool_style="xml") == [TIME]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("Let me think</think>Yes", [Reasoning("Let me think"), Content("Yes")]),
        ("\n\nHm\n \n\n</think>\n\n Yes\n", [Reasoning("Hm\n "), Content(" Yes\n")]),
        ("No end\n", [Reasoning("No end\n")]),
        ("No end</think", [Reasoning("No end</think")]),
        ("</think>\n\n", []),
        ("<think>a</think>", [Reasoning("<think>a")]),
        (json_call("time", "{}"), [Reasoning(json_call("time", "{}"))]),
        ("a</think>" + json_call("time", "{}"), [Reasoning("a"), TIME]),
        ("a</think>b</think>c", [Reasoning("a"), Content("b</think>c")]),
    ],
)
def test_a_thought_that_the_prompt_opened(text: str, events: list) -> None:
    assert read([text], starts_in_reasoning=True) == events
    assert read([text], starts_in_reasoning=True, reads_reasoning=False) == events


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("<think>\nHm\n</think>\n\nYes", [Reasoning("Hm"), Content("Yes")]),
        (" \n<think>Hm", [Reasoning("Hm")]),
        ("<think>\n\n</think>\n\n" + json_call("time", "{}"), [TIME]),
        ("A <think>Hm</think>", [Content("A <think>Hm</think>")]),
        (" <thin", [Content(" <thin")]),
        (" " * parser_module.MAX_SPACE_LENGTH + "<think>Hm", [Reasoning("Hm")]),
    ],
)
def test_a_thought_that_the_answer_opens(text: str, events: list) -> None:
    assert read([text]) == events
    expected = [TIME] if TIME in events else []
    assert [event for event in read([text], reads_reasoning=False) if event == TIME] == expected
    assert not any(isinstance(event, Reasoning) for event in read([text], reads_reasoning=False))


def test_too_much_white_space_opens_no_thought_and_is_kept() -> None:
    space = "\n" * (parser_module.MAX_SPACE_LENGTH + 1)
    assert read([space + "<think>a</think>"]) == [Content(space + "<think>a</think>")]
    assert read(space + "<think>a</think>") == [Content(space + "<think>a</think>")]


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 2047, 2048, 2049, 5000])
def test_long_white_space_is_dropped_but_for_whole_kibibytes(length: int) -> None:
    text = "a" + " " * length + json_call("time", "{}")
    kept = (length - 1) // parser_module.MAX_SPACE_LENGTH * parser_module.MAX_SPACE_LENGTH
    for pieces in ([text], text, [text[:1000], text[1000:]]):
        assert read(pieces) == [Content("a" + " " * kept), TIME]
    thought = "a" + "\n" * length + "</think>"
    for pieces in ([thought], thought):
        assert read(pieces, starts_in_reasoning=True) == [Reasoning("a" + "\n" * kept)]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("a \n" + json_call("time", "{}"), [Content("a"), TIME]),
        (json_call("time", "{}") * 2, [TIME, TIME]),
        (json_call("time", "{}") + "\n\n" + json_call("time", "{}") + " \n", [TIME, TIME]),
        (json_call("time", "{}") + "\n b \n" + json_call("time", "{}"), [TIME, Content("\n b"), TIME]),
        (json_call("time", "{}") + "\n b \n", [TIME, Content("\n b \n")]),
        (" \n" + json_call("time", "{}"), [TIME]),
        ("a \n<tool_call>", [Content("a \n<tool_call>")]),
    ],
)
def test_white_space_around_calls_is_dropped(text: str, events: list) -> None:
    assert read([text]) == events


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (json_call("weather", '{ "city":"Zürich" ,"x": 1e400, "y":-0.0}'),
         Call("weather", '{ "city":"Zürich" ,"x": 1e400, "y":-0.0}')),
        (json_call("no_such_tool", "{}"), Call("no_such_tool", "{}")),
        ('<tool_call>{"arguments":{"a":{"name":"b"}},"name":"time"}</tool_call>', Call("time", '{"a":{"name":"b"}}')),
        ('<tool_call>{"name":"time"}</tool_call>', TIME),
        ('<tool_call>{"name":"time","arguments":null}</tool_call>', TIME),
        ('<tool_call>{"name":"time","arguments":""}</tool_call>', TIME),
        ('<tool_call>{"name":"time","arguments":" {\\"a\\": \\"\\\\u00e9\\"}"}</tool_call>',
         Call("time", '{"a": "\\u00e9"}')),
        ('<tool_call>{"id":7,"name":"time","arguments":{}}</tool_call>', TIME),
        ('<tool_call>{"name":"ti\\u006de","arguments":{}}</tool_call>', TIME),
        (json_call("time", '{"a": "</tool_call>}{[\\"<tool_call>"}'),
         Call("time", '{"a": "</tool_call>}{[\\"<tool_call>"}')),
        (json_call("time", '{"a": "\\ud83d\\ude42"}'), Call("time", '{"a": "\\ud83d\\ude42"}')),
        (json_call("time", '{"a": ' + "[" * 62 + "]" * 62 + "}"), Call("time", '{"a": ' + "[" * 62 + "]" * 62 + "}")),
        (json_call("time", '{"a": ' + "9" * 20_000 + "}"), Call("time", '{"a": ' + "9" * 20_000 + "}")),
    ],
)  # fmt: skip
def test_json_calls(text: str, call: Call) -> None:
    assert read([text]) == [call]
    if len(text) < 10_000:
        assert json.loads(call.arguments) is not None


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>time</tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>[{"name": "time"}]</tool_call>',
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": "time"} {"name": "time"}</tool_call>',
        '<tool_call>{"name": "time"',
        '<tool_call>{"name": "time"}',
        '<tool_call>{"name": "time"}</tool_call',
        '<tool_call>{"name": "time",}</tool_call>',
        '<tool_call>{"name": "time" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "name": "time"}</tool_call>',
        "<tool_call>{'name': 'time'}</tool_call>",
        '<tool_call>{name: "time"}</tool_call>',
        json_call("", "{}"),
        json_call("time", "[]"),
        json_call("time", "0"),
        json_call("time", "false"),
        json_call("time", '"{"'),
        json_call("time", '"[1]"'),
        json_call("time", '"{\\"a\\": 1, \\"a\\": 2}"'),
        json_call("time", '{"a": {"b": 1, "b": 1}}'),
        json_call("time", '{"a": Infinity}'),
        json_call("time", '{"a": -Infinity}'),
        json_call("time", '{"a": 01}'),
        json_call("time", '{"a": "\\x"}'),
        json_call("time", '{"a": "\\ud800"}'),
        json_call("ti\\ud800me", "{}"),
        json_call("time", '"{\\"a\\": \\"\\\\ud800\\"}"'),
        json_call("time", '{"a": "tab\there"}'),
        json_call("time", '{"a": [1}'),
        json_call("time", '{"a": ' + "[" * 63 + "]" * 63 + "}"),
        json_call("time", '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"),
        json_call("time", '"' + "{\\\"a\\\": " + "[" * 64 + "]" * 64 + '}"'),
        json_call("time", "{" * 100_000),
    ],
)  # fmt: skip
def test_malformed_json_calls_are_content_as_they_are(text: str) -> None:
    assert read([text]) == [Content(text)]


def test_after_a_malformed_call_the_next_is_read() -> None:
    for bad in ('<tool_call>{"name": "x", "arguments": {}\n</tool_call>', '<tool_call>{"name": "x', "<tool_call>"):
        assert read([bad + "\n" + json_call("time", "{}")]) == [Content(bad), TIME]


def test_a_call_of_a_mebibyte_is_the_longest() -> None:
    room = parser_module.MAX_CALL_LENGTH - len(json_call("time", '{"a": ""}'))
    longest = json_call("time", '{"a": "' + "x" * room + '"}')
    (call,) = read([longest])
    assert isinstance(call, Call) and len(call.arguments) > room
    longer = longest.replace("xxx", "xxxx", 1)
    for pieces in ([longer], [longer[:-1], longer[-1]], [longer[n : n + 999] for n in range(0, len(longer), 999)]):
        assert read([*pieces, json_call("time", "{}")]) == [Content(longer), TIME]
    parser = OutputParser(tool_style="json", tools=TOOLS)
    events = parser.push('<tool_call>{"name": "' + "x" * parser_module.MAX_CALL_LENGTH)
    assert sum(len(event[0]) for event in events) == parser_module.MAX_CALL_LENGTH + 21
