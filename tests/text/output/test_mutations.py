"""A thousand damaged calls: what comes out is what was meant, or nothing."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from qnext.text.output import Call
from tests.text.output.outputs import read

Meant = list[tuple[str, dict[str, Any]]]

NUM_MUTATIONS = 1_000
LEAST_SHARE = 0.65  # of the damaged texts whose calls all come out; docs/log.md has what was measured


def tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required or properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TOOLS = [
    tool("set_fan", room=TEXT, speed=COUNT, quiet=FLAG),
    tool("write_file", path=TEXT, content=TEXT),
    tool("search", ("query",), query=TEXT, limit=COUNT, filters={"type": "object"}),
    tool(
        "book",
        guests={"type": "array", "items": TEXT},
        when={"anyOf": [TEXT, {"type": "null"}]},
        price={"type": "number"},
    ),
    tool("put", key=TEXT, value={}),
    tool("now", ("zone",), zone=TEXT),
]
CODE = 'def greet(name):\n    if name == "":\n        return None\n    return f"<b>{name}</b> \\\\ done"\n'
NOTE = "# Tags\n\nA call ends with </tool_call> and not with </parameter> alone."
FILTERS = {"lang": ["de", "en"], "safe": True, "max": None}
MEANT: list[Meant] = [
    [("set_fan", {"room": "attic", "speed": 3, "quiet": True})],
    [("set_fan", {"room": "Zürich 🙂", "speed": 0, "quiet": False})],
    [("write_file", {"path": "src/greet.py", "content": CODE})],
    [("write_file", {"path": "notes.md", "content": NOTE})],
    [("write_file", {"path": "page.html", "content": '<p>It\'s "late"</p>\n\n<ul>\n\t<li>{}</li>\n</ul>'})],
    [("search", {"query": "what is 5 < 7?", "limit": 10, "filters": FILTERS})],
    [("search", {"query": "null"})],
    [("book", {"guests": ["Ann", "O'Neil"], "when": None, "price": 12.5})],
    [("put", {"key": "a.b", "value": {"x": [1, {"y": "z"}]}}), ("now", {"zone": "UTC"})],
    [("now", {"zone": "Europe/Oslo"}), ("set_fan", {"room": "hall", "speed": 12, "quiet": True})],
]


def xml(meant: Meant) -> str:
    def bare(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    calls = []
    for name, arguments in meant:
        parameters = "".join(f"<parameter={key}>\n{bare(value)}\n</parameter>\n" for key, value in arguments.items())
        calls.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(calls)


def as_json(meant: Meant) -> str:
    bodies = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in meant]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


SOURCES = [(write, meant) for meant in MEANT for write in (xml, as_json)]
TAGS = re.compile(r"(?m)^</?(?:tool_call|function|parameter)(?:=[^>]*)?>\n?")


def a_tag(draw: random.Random, text: str) -> re.Match[str]:
    return draw.choice(list(TAGS.finditer(text)))


def drop(draw: random.Random, text: str, meant: Meant) -> str:
    tag = a_tag(draw, text)
    return text[: tag.start()] + text[tag.end() - (draw.random() < 0.3 and tag[0].endswith("\n")) :]


def double(draw: random.Random, text: str, meant: Meant) -> str:
    tag = a_tag(draw, text)
    return text[: tag.end()] + ("" if tag[0].endswith("\n") else "\n") + tag[0] + text[tag.end() :]


def cut(draw: random.Random, text: str, meant: Meant) -> str:
    return text[: draw.randrange(len(text))]


def swap(draw: random.Random, text: str, meant: Meant) -> str:
    """Two tags that follow one another change their places."""
    pairs = [(first, second) for first, second in pairwise(TAGS.finditer(text)) if first.end() == second.start()]
    if not pairs:
        return drop(draw, text, meant)
    first, second = draw.choice(pairs)
    return text[: first.start()] + second[0].rstrip("\n") + "\n" + first[0] + text[second.end() :]


def nest(draw: random.Random, text: str, meant: Meant) -> str:
    """A tag of a call where none belongs, or the whole call inside another pair of tags."""
    if draw.random() < 0.5:
        return f"<tool_call>\n{text}\n</tool_call>"
    at, what = a_tag(draw, text), a_tag(draw, text)
    return text[: at.start()] + what[0].rstrip("\n") + "\n" + text[at.start() :]


def reorder(draw: random.Random, text: str, meant: Meant) -> str:
    shuffled = [(name, dict(draw.sample(list(arguments.items()), len(arguments)))) for name, arguments in meant]
    if text.startswith("<tool_call>\n<function"):
        return xml(shuffled)
    bodies = [json.dumps({"arguments": arguments, "name": name}) for name, arguments in shuffled]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def literals(draw: random.Random, text: str, meant: Meant) -> str:
    """As Python writes values; as JSON with commas and control characters too many."""
    if text.startswith("<tool_call>\n<function"):
        for old, new in (("\ntrue\n", "\nTrue\n"), ("\nfalse\n", "\nFalse\n"), ("\nnull\n", "\nNone\n")):
            if text.count("query") == 0:  # there null is a text
                text = text.replace(old, new)
        return re.sub(r'(?m)^[\[{]".*$', lambda found: repr(json.loads(found[0])), text)
    bodies = []
    for name, arguments in meant:
        kind = draw.randrange(3)
        body = (
            repr({"name": name, "arguments": arguments})
            if kind == 0
            else json.dumps({"name": name, "arguments": arguments})
        )
        if kind == 1:
            body = body[:-2] + ",}}"
        if kind == 2:
            body = re.sub(r"(?<!\\)\\n", "\n", body)
        bodies.append(body)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def spell(draw: random.Random, text: str, meant: Meant) -> str:
    """Tags with white space, quotes or attributes."""
    form = draw.choice(['<{} name="{}">', "<{}='{}'>", "< {} = {} >", "<{}={} >"])
    return re.sub(r"(?m)^<(function|parameter)=([^>]*)>", lambda found: form.format(found[1], found[2]), text)


def marks(draw: random.Random, text: str, meant: Meant) -> str:
    """A bracket, a quote, a comma or a newline is missing, but not of what a string says."""
    said = [value for _, arguments in meant for value in arguments.values() if isinstance(value, str)]
    spans = [
        found.span()
        for value in said
        for form in (value, json.dumps(value, ensure_ascii=False)[1:-1])
        for found in re.finditer(re.escape(form), text)
        if form
    ]
    places = [found.start() for found in re.finditer(r'[{}\[\]",:\n>]', text)]
    place = draw.choice([place for place in places if not any(start <= place <= end for start, end in spans)])
    return text[:place] + text[place + 1 :]


MUTATIONS: list[Callable[[random.Random, str, Meant], str]] = [
    drop,
    double,
    cut,
    swap,
    nest,
    reorder,
    literals,
    spell,
    marks,
]


def is_part(found: Meant, meant: Meant, text: str) -> bool:
    """Whether every call that was found was meant, as often. What has no type may be the text as it was written."""
    left = list(meant)
    for name, arguments in found:
        match = next((call for call in left if call == (name, arguments)), None)
        if match is None and name == "put" and isinstance(said := arguments.get("value"), str) and said in text:
            match = next((call for call in left if call[0] == name and call[1] | {"value": said} == arguments), None)
        if match is None:
            return False
        left.remove(match)
    return True


def calls_of(text: str, **options: Any) -> Meant:
    parts = read([text], tools=TOOLS, tool_style="json", **options)
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]


def test_the_texts_are_sound() -> None:
    assert len(SOURCES) == 20
    for write, meant in SOURCES:
        assert calls_of(write(meant)) == meant
        assert calls_of("I see.\n\n" + write(meant), starts_in_reasoning=True) == meant


@pytest.mark.parametrize("thinks", [False, True])
def test_a_damaged_call_is_what_was_meant_or_none(thinks: bool) -> None:
    draw = random.Random(11)
    num: Counter[str] = Counter()
    num_whole: Counter[str] = Counter()
    for number in range(NUM_MUTATIONS):
        write, meant = SOURCES[number % len(SOURCES)]
        mutate = MUTATIONS[number // len(SOURCES) % len(MUTATIONS)]
        text = mutate(draw, write(meant), meant)
        found = calls_of(text, starts_in_reasoning=thinks)
        assert is_part(found, meant, text), (mutate.__name__, text, found)
        num[mutate.__name__] += 1
        num_whole[mutate.__name__] += found == meant
    share = num_whole.total() / num.total()
    print({name: round(num_whole[name] / num[name], 2) for name in num}, share)
    assert thinks or share >= LEAST_SHARE
