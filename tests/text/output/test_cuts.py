"""Every cutting of an answer gives the same events, and no text is lost."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.text.output import (
    Call,
    CallArguments,
    CallCut,
    CallEnd,
    CallStart,
    Content,
    CutCall,
    OutputEvent,
    OutputParser,
)
from qnext.text.output import calls as calls_module
from qnext.text.output import parser as parser_module
from tests.pace import growth
from tests.text.output.outputs import JSON_OUTPUTS, TOOLS, XML_OUTPUTS, json_call, read, xml_call

MODES: dict[str, dict[str, Any]] = {
    "json": {"tool_style": "json"},
    "xml": {"tool_style": "xml"},
    "none": {"tool_style": None},
    "json thinking": {"tool_style": "json", "starts_in_reasoning": True},
    "xml thinking": {"tool_style": "xml", "starts_in_reasoning": True},
    "json plain": {"tool_style": "json", "reads_reasoning": False},
    "xml plain": {"tool_style": "xml", "reads_reasoning": False},
}
# Every place in these, in the others some places: without thoughts or without calls a parser does a part of the same,
# and the two styles of calls are read alike, which test_the_style_that_was_asked_for_does_not_matter holds.
FULLY = ("json", "xml thinking")
OUTPUTS = [*JSON_OUTPUTS, *XML_OUTPUTS]
# What fuzzed answers are made of: tags whole and in parts, the marks of JSON, and space.
ATOMS = [
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "time>",
    "</function>",
    "<parameter=",
    "a>",
    "</parameter>",
    "<think>",
    "</think>",
    "<tool_",
    "</",
    "<",
    ">",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    '"name"',
    '"arguments"',
    ":",
    ",",
    "\n",
    " ",
    "x",
    "é",
    "🙂",
    "0",
    json_call("time", "{}"),
    xml_call("time", a="1"),
    "<function=time></function>",
    "\x00",
]
texts = st.lists(st.sampled_from(ATOMS), max_size=30).map("".join)


def places_in(text: str, mode: str) -> range:
    """Places to cut at; of a mode that is not read fully others in each, together all."""
    if mode in FULLY:
        return range(len(text) + 1)
    others = [other for other in MODES if other not in FULLY]
    return range(others.index(mode), len(text) + 1, len(others))


def assert_a_cut_changes_nothing(text: str, mode: str, places: range) -> None:
    whole = read([text], **MODES[mode])
    assert read(text, **MODES[mode]) == whole
    for place in places:
        assert read([text[:place], text[place:]], **MODES[mode]) == whole


def assert_beginnings_are_the_same(text: str, mode: str, lengths: range) -> None:
    """Cut off there: the same from characters as from one piece."""
    for length in lengths:
        assert read(text[:length], **MODES[mode]) == read([text[:length]], **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", OUTPUTS)
def test_a_cut_in_two_and_every_character_alone(text: str, mode: str) -> None:
    assert_a_cut_changes_nothing(text, mode, places_in(text, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", OUTPUTS)
def test_beginnings_of_an_answer(text: str, mode: str) -> None:
    assert_beginnings_are_the_same(text, mode, places_in(text, mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in FULLY])
@pytest.mark.parametrize("text", OUTPUTS)
def test_every_place_in_every_mode(text: str, mode: str) -> None:
    assert_a_cut_changes_nothing(text, mode, range(len(text) + 1))
    assert_beginnings_are_the_same(text, mode, range(len(text) + 1))


@pytest.mark.parametrize("kind", ["", " thinking", " plain"])
@pytest.mark.parametrize("text", OUTPUTS)
def test_the_style_that_was_asked_for_does_not_matter(text: str, kind: str) -> None:
    for pieces in ([text], text):
        assert read(pieces, **MODES[f"json{kind}"]) == read(pieces, **MODES[f"xml{kind}"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", OUTPUTS)
def test_what_came_out_is_never_taken_back(text: str, mode: str) -> None:
    """Whatever follows, the answer begins with what its beginning gave, and a call that began ends or is cut."""
    parser = OutputParser(**{"tools": TOOLS, **MODES[mode]})
    events: list[OutputEvent] = []
    is_open = False
    for character in text:
        events += parser.push(character)
    for event in [*events, *parser.finish()]:
        assert is_open == isinstance(event, (CallArguments, CallEnd, CallCut))
        is_open = isinstance(event, CallStart) or (is_open and isinstance(event, CallArguments))
    assert not is_open


@pytest.mark.parametrize("style", ["json", "xml"])
def test_a_call_cut_off_is_no_call(style: str) -> None:
    text = json_call("weather", '{"city": "a </tool_call>\\n", "n": [1, {}]}')
    last = len(text) - len("}\n</tool_call>")  # the arguments are whole
    if style == "xml":
        text = xml_call("weather", city="a </parameter>", days="3")
        last = text.rindex("</function>") + len("</function>")
    for length in range(1, len(text) + 1):
        (part,) = read([text[:length]], tool_style=style)
        assert isinstance(part, Call) == (length >= last)
        if isinstance(part, CutCall):
            assert part.text == text[:length]
            with pytest.raises(ValueError):
                json.loads(part.arguments)
        elif isinstance(part, Content):
            assert part.text == text[:length]


@settings(max_examples=400, deadline=None)
@given(texts, st.lists(st.integers(0, 400), max_size=12), st.sampled_from(sorted(MODES)))
def test_random_cuttings_of_random_answers(text: str, places: list[int], mode: str) -> None:
    ends = sorted({0, len(text), *(min(place, len(text)) for place in places)})
    pieces = [text[start:end] for start, end in pairwise(ends)]
    whole = read([text], **MODES[mode])
    assert read(pieces, **MODES[mode]) == whole
    assert read(text, **MODES[mode]) == whole


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(0, 3), st.integers(1, 7), st.integers(0, 12), st.sampled_from(["json", "xml"]))
def test_limits_hold_at_the_same_character(text: str, trials: int, call: int, space: int, style: str) -> None:
    """The longest call and the longest white space, made so short that fuzzed answers reach them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls_module, "MAX_CALL_LENGTH", 12 + call * 9)
        patch.setattr(parser_module, "MAX_SPACE_LENGTH", space + 1)
        patch.setattr(parser_module, "MAX_TRIALS", trials)
        whole = read([text], tool_style=style)
        assert read(text, tool_style=style) == whole
        assert read([text[n : n + 5] for n in range(0, len(text), 5)], tool_style=style) == whole


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([atom for atom in ATOMS if atom != "<parameter="]), max_size=30), st.booleans())
def test_no_text_is_lost(parts: list[str], thinks: bool) -> None:
    """All letters that stand in no tag come out, somewhere."""
    text = "".join(parts)
    found = "".join("".join(part) for part in read([text], starts_in_reasoning=thinks))
    assert all(found.count(letter) >= text.count(letter) for letter in "é🙂")


# Nothing of this opens a call, not even put together.
HARMLESS = [atom for atom in ATOMS if not atom.startswith(("<tool_call>", "<function=")) and "</" not in atom[:-2]]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(HARMLESS), st.integers(0, 2)), max_size=20), st.sampled_from(["json", "xml"]))
def test_whole_calls_are_found_among_other_text(parts: list[str | int], style: str) -> None:
    pieces: list[str] = []
    expected: list[str | Call] = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
            expected.extend("".join(part.split()))
            continue
        if style == "json":
            pieces.append(json_call("weather", f'{{"days": {part}}}'))
        else:
            pieces.append(xml_call("weather", days=str(part))[12 * (part == 0) : -12 if part == 0 else None])
        expected.append(Call("weather", f'{{"days": {part}}}'))
    events = read(["".join(pieces)], tool_style=style, reads_reasoning=False)
    found: list[str | Call] = []
    for event in events:
        found.extend([event] if isinstance(event, Call) else "".join(event.text.split()))
    assert found == expected


def calls_of(events: list) -> list[Call]:
    return [event for event in events if isinstance(event, Call)]


def long_outputs(size: int) -> dict[str, tuple[str, str]]:
    opening = '<tool_call>{"name": "time", "arguments": {"a": '
    value = "<tool_call><function=weather><parameter=city>"
    end = "</parameter></function></tool_call>"
    return {
        "string": ("json", opening + '"' + "x" * size + '"}}</tool_call>'),
        "escapes": ("json", opening + '"' + r"\"" * (size // 2) + '"}}</tool_call>'),
        "numbers": ("json", opening + "[" + "1," * (size // 2) + "1]}}</tool_call>"),
        "digits": ("json", opening + "1" * size + "}}</tool_call>"),
        "value": ("xml", value + "x" * size + end),
        "tags in a value": ("xml", value + "</parameter>\n" * (size // 13) + end),
        "begun tags": ("xml", value + "</parameter" * (size // 11) + end),
        "text": ("json", "lorem <ipsum>\n" * (size // 14)),
        "space": ("json", " \n" * (size // 2)),
        "openings": ("json", "<tool_call>" * (size // 11)),
        "malformed": ("json", '<tool_call>{"name" 1}</tool_call>' * (size // 33)),
        "calls": ("json", json_call("time", "{}") * (size // 58)),
        "bare calls": ("xml", "<function=weather><parameter=days>1</parameter></function>" * (size // 58)),
        "no end": ("json", opening + '"' + "x" * size),
    }


@pytest.mark.parametrize("name", long_outputs(0))
def test_work_is_linear(name: str) -> None:
    """At once, in pieces and character by character; of ten times as much, work that grows with the square would take
    a hundred times as long."""
    size = 200_000 if name == "string" else 20_000
    style, text = long_outputs(size)[name]
    _, tenth = long_outputs(size // 10)[name]
    whole = read([text], tool_style=style, tools=TOOLS)

    def read_in(length: int, part: str) -> None:
        found = read([part[n : n + length] for n in range(0, len(part), length)], tool_style=style)
        assert part != text or found == whole

    for length in (size, 7, 1):
        assert growth(partial(read_in, length, tenth), partial(read_in, length, text), tries=2) < 20, length
