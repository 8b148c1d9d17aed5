"""What an answer is read as: one example and more for each rule."""

from __future__ import annotations

import json

import pytest

from qnext.text.output import (
    Call,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    CutCall,
    OutputParser,
    Reasoning,
    joined,
)
from qnext.text.output import calls as calls_module
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


def test_a_call_comes_out_as_it_becomes_certain() -> None:
    parser = OutputParser(tool_style="json", tools=TOOLS)
    text = json_call("weather", '{"city": "Oslo"}')
    begin, middle, end = text.partition("Oslo")
    assert parser.push("Wait.\n" + begin) == [Content("Wait."), CallStart("weather"), CallArguments('{"city": "')]
    assert parser.push(middle) == [CallArguments("Oslo")]
    assert parser.num_calls == 0
    assert parser.push(end) == [CallArguments('"}'), CallEnd()]
    assert parser.num_calls == 1
    assert joined(parser.push("\n" + json_call("time", "{}"))) == [TIME]
    assert parser.num_calls == 2
    assert parser.push("\n") == parser.finish() == []


def test_without_tools_tags_are_text() -> None:
    for text in (json_call("time", "{}"), xml_call("time"), "a \n"):
        assert read([text], tool_style=None) == [Content(text)]
        assert OutputParser(tool_style=None).push(text) == [Content(text)]


@pytest.mark.parametrize("style", ["json", "xml"])
def test_each_style_reads_the_calls_of_both(style: str) -> None:
    """A model may have been trained on the other form."""
    for text in (
        json_call("time", "{}"),
        xml_call("time"),
        "<function=time></function>",
        xml_call("time") + "\n",
        "<tool_call><function=time>{}</function></tool_call>",
    ):
        assert read([text], tool_style=style) == [TIME]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("Let me think</think>Yes", [Reasoning("Let me think"), Content("Yes")]),
        ("\n\nHm\n \n\n</think>\n\n Yes\n", [Reasoning("Hm\n "), Content(" Yes\n")]),
        ("No end\n", [Reasoning("No end\n")]),
        ("No end</think", [Reasoning("No end</think")]),
        ("</think>\n\n", []),
        ("<think>a</think>", [Reasoning("a")]),
        ("\n<think>\na\n</think>\n</think>\n\nb", [Reasoning("a"), Content("b")]),
        ("a\n</think>\n\n</think>\n\n" + json_call("time", "{}"), [Reasoning("a"), TIME]),
        ("a <think>\nb</think>c", [Reasoning("a <think>\nb"), Content("c")]),
        (json_call("time", "{}") + "\nNo.", [Reasoning(json_call("time", "{}") + "\nNo.")]),
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
        ("<think><think>Hm</think></think>\n\nYes", [Reasoning("Hm"), Content("Yes")]),
        ("<think>Hm</think>\nYes</think>", [Reasoning("Hm"), Content("Yes</think>")]),
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
        (
            json_call("weather", '{ "city":"Zürich" ,"x": 1e400, "y":-0.0}'),
            Call("weather", '{ "city":"Zürich" ,"x": 1e400, "y":-0.0}'),
        ),
        (json_call("no_such_tool", "{}"), Call("no_such_tool", "{}")),
        ('<tool_call>{"arguments":{"a":{"name":"b"}},"name":"time"}</tool_call>', Call("time", '{"a":{"name":"b"}}')),
        ('<tool_call>{"name":"time"}</tool_call>', TIME),
        ('<tool_call>{"name":"time","arguments":null}</tool_call>', TIME),
        ('<tool_call>{"name":"time","arguments":""}</tool_call>', TIME),
        (
            '<tool_call>{"name":"time","arguments":" {\\"a\\": \\"\\\\u00e9\\"}"}</tool_call>',
            Call("time", '{"a": "\\u00e9"}'),
        ),
        ('<tool_call>{"id":7,"name":"time","arguments":{}}</tool_call>', TIME),
        ('<tool_call>{"name":"ti\\u006de","arguments":{}}</tool_call>', TIME),
        (
            json_call("time", '{"a": "</tool_call>}{[\\"<tool_call>"}'),
            Call("time", '{"a": "</tool_call>}{[\\"<tool_call>"}'),
        ),
        (json_call("time", '{"a": "\\ud83d\\ude42"}'), Call("time", '{"a": "\\ud83d\\ude42"}')),
        (json_call("time", '{"a": ' + "[" * 62 + "]" * 62 + "}"), Call("time", '{"a": ' + "[" * 62 + "]" * 62 + "}")),
        (json_call("time", '{"a": ' + "9" * 20_000 + "}"), Call("time", '{"a": ' + "9" * 20_000 + "}")),
    ],
)
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
        "<tool_call>[]</tool_call>",
        '<tool_call>["time"]</tool_call>',
        '<tool_call>{"name": 5}</tool_call>',
        '<tool_call>{"name": null, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time"',
        '<tool_call>{"name": "time" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "name": "time"}</tool_call>',
        '<tool_call>{name: "time"}</tool_call>',
        '<tool_call>{"name": "time", "city": "Oslo"}</tool_call>',
        '<tool_call>{"city": "Oslo", "name": "time"}</tool_call>',
        json_call("", "{}"),
        json_call("time", "[]"),
        json_call("time", "0"),
        json_call("time", "false"),
        json_call("time", '"{"'),
        json_call("time", '"[1]"'),
        json_call("time", '"{\\"a\\": 1, \\"a\\": 2}"'),
        json_call("ti\\ud800me", "{}"),
        json_call("time", '"{\\"a\\": \\"\\\\ud800\\"}"'),
        json_call("time", '"' + '{\\"a\\": ' + "[" * 64 + "]" * 64 + '}"'),
        "Write `" + json_call("time", "{}") + "`.",
    ],
)
def test_malformed_json_calls_are_content_as_they_are(text: str) -> None:
    assert read([text]) == [Content(text)]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": {"b": 1, "b": 1}}',
        '{"a": 1, "a": 1}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": NaN}',
        '{"a": 01}',
        '{"a": 1.}',
        '{"a": "\\x"}',
        '{"a": "\\ud800"}',
        '{"a": "\\udc00"}',
        '{"a": [1}',
        '{"a": "x" "y"}',
        '{"a": (1)}',
        '{"a": print("x")}',
        '{"a": "say "hi" now"}',
        '{"a": undefined}',
        '{"a": 1; "b": 2}',
        '{"a": ' + "[" * 63 + "]" * 63 + "}",
        '{"a": ' + "[" * 9_000 + "]" * 9_000 + "}",
        "{" * 9_000,
        '{"a": 1}, "b": 2',
        '{"a": 1 // one\n}',
        "{,}",
        '{"a": 1,,}',
        '{"a": }',
        '{"a"}',
        "{a: 1}",
    ],
)
def test_arguments_that_go_on_as_no_json_can_are_cut_off(arguments: str) -> None:
    """What came of them stays the beginning of a text, which no client can take for arguments."""
    text = json_call("time", arguments)
    call, *rest = read([text])
    assert isinstance(call, CutCall) and call.name == "time"
    with pytest.raises(ValueError):
        json.loads(call.arguments)
    assert text.startswith(call.text) and call.text + "".join(event[0] for event in rest) == text


def test_after_a_malformed_call_the_next_is_read() -> None:
    for bad in ('<tool_call>{"name": 1, "arguments": {}\n</tool_call>', '<tool_call>{"name": "x', "<tool_call>x"):
        assert read([bad + "\n" + json_call("time", "{}")]) == [Content(bad), TIME]


def test_a_call_of_a_mebibyte_is_the_longest() -> None:
    room = calls_module.MAX_CALL_LENGTH - len(json_call("time", '{"a": ""}'))
    longest = json_call("time", '{"a": "' + "x" * room + '"}')
    (call,) = read([longest])
    assert isinstance(call, Call) and len(call.arguments) > room
    longer = longest.replace("xxx", "x" * 24, 1)
    for pieces in ([longer], [longer[:-1], longer[-1]], [longer[n : n + 999] for n in range(0, len(longer), 999)]):
        cut, content, *calls = read([*pieces, json_call("time", "{}")])
        assert isinstance(cut, CutCall) and isinstance(content, Content) and calls == [TIME]
        assert cut.text + content.text == longer
