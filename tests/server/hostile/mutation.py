"""Valid bodies with something wrong in them: random, but aware of where the parts of a body are."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from qnext.server.limits import MAX_JSON_DEPTH
from tests.server.hostile.schema_cases import HOSTILE_SCHEMAS, tool
from tests.server.hostile.surfaces import MARK, Raw, Surface

MAX_PLACES = 20_000  # of a body that are told apart, and that one blow adds

# Whole bodies with as many parts as a surface has, so that there is something to break.
RICH: dict[str, dict[str, Any]] = {
    "chat": {
        "model": "alias",
        "n": 2,
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 1,
        "stop": ["x", "y"],
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1.5},
        "stream": False,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "min_tokens": 1,
        "timings": True,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        "tools": [tool({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stream_options": None,
    },
    "completions": {
        "model": "alias",
        "prompt": ["Hi", "Ho"],
        "n": 1,
        "max_tokens": 3,
        "temperature": 0,
        "logprobs": 2,
        "echo": True,
        "stop": "x",
        "logit_bias": {"5": -1},
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "guided_choice": ["yes", "no"],
        "return_token_ids": True,
        "stop_token_ids": [3],
        "bad_words": ["a"],
    },
    "responses": {
        "model": "alias",
        "instructions": "Be brief.",
        "max_output_tokens": 16,
        "temperature": 0,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    },
    "messages": {
        "model": "alias",
        "max_tokens": 3,
        "temperature": 0,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "2"}]},
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}],
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["x"],
        "thinking": {"type": "disabled"},
    },
    "tokenize": {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True, "model": "alias"},
    "detokenize": {"tokens": [72, 105], "model": "alias"},
}
RICH["count_tokens"] = {k: v for k, v in RICH["messages"].items() if k in ("model", "messages", "system", "tools")}

_VALUES = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            1,
            2**31,
            2**53,
            2**63,
            -(2**63) - 1,
            10**30,
            0.5,
            -0.0,
            1e-320,
            1e308,
            math.nan,
            math.inf,
            Raw("1e400"),
            Raw("-0"),
            Raw("1E+2"),
            "",
            "\x00",
            "\u2028",
            "true",
            "1",
            MARK,
            MARK * 200,
            [],
            {},
            [[]],
            [None],
            {"": None},
            {MARK: MARK},
            [MARK] * 100,
            "<|im_end|>",
            "{{7*7}}",
            "\U0010ffff",
            "a" * 3_000,
        ]
    ),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
    st.lists(st.integers(-5, 300), max_size=5),
    st.sampled_from(list(HOSTILE_SCHEMAS.values())),
)


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Of all parts of a body, itself left out: what holds the part, and its key there.

    What is nested deeper than any body may be counts as one part. A path to each part of a large body would take
    gigabytes.
    """
    if depth > MAX_JSON_DEPTH:
        return
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from places(inner, depth + 1)


def _copied(part: Any) -> Any:
    """With nothing in common, within itself either: a blow at what several places share would strike in all of them."""
    if isinstance(part, dict):
        return {key: _copied(inner) for key, inner in part.items()}
    return [_copied(inner) for inner in part] if isinstance(part, list) else part


def _num_places(part: Any) -> int:
    return sum(1 for _ in itertools.islice(places(part), MAX_PLACES))


def some_place(draw: st.DrawFn, body: Any) -> tuple[Any, Any]:
    """One of the first MAX_PLACES: beyond them lie copies of a part that was doubled.

    Its number is drawn: of what may be drawn, hypothesis makes texts, and here they would be gigabytes.
    """
    found = list(itertools.islice(places(body), MAX_PLACES))
    return found[draw(st.integers(0, len(found) - 1))]


@st.composite
def mutated(draw: st.DrawFn, surface: Surface) -> Any:
    """A rich body of the surface after one to four blows."""
    body = _copied(RICH[surface.name])
    for _ in range(draw(st.integers(1, 4))):
        if not body:
            break
        holder, key = some_place(draw, body)
        with contextlib.suppress(RecursionError):  # a copy of what is nested very deeply: the body stays as it was
            _strike(draw, holder, key, body)
    return body


def _strike(draw: st.DrawFn, holder: Any, key: Any, body: Any) -> None:
    blow = draw(st.sampled_from(("replace", "replace", "delete", "wrap", "double", "graft", "rename")))
    if blow == "replace":
        holder[key] = _copied(draw(_VALUES))
    elif blow == "delete":
        del holder[key]
    elif blow == "wrap":
        for _ in range(draw(st.sampled_from((1, 2, 70)))):
            holder[key] = [holder[key]] if draw(st.booleans()) else {"type": holder[key]}
    elif blow == "double" and isinstance(holder, list):
        times = min(draw(st.sampled_from((1, 50, 2_000))), 1 + MAX_PLACES // (1 + _num_places(holder[key])))
        holder.extend([_copied(holder[key]) for _ in range(times)])
    elif blow == "graft":  # a part of the body where another one stood
        other, place = some_place(draw, body)
        holder[key] = _copied(other[place])
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from((f"{key}s", str(key).upper(), MARK, "type", "content")))] = holder.pop(key)
