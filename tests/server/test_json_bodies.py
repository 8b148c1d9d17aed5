"""An object that has one key twice is refused, and no other."""

from __future__ import annotations

import json
import random
from typing import Any

import orjson
import pytest

from qnext.server.body.double_keys import check_keys
from qnext.server.errors import ApiError
from qnext.server.surfaces.openai.chat_bodies import ChatBody
from tests.server.serving import Running


def refusal(text: str) -> ApiError | None:
    raw = text.encode()
    try:
        check_keys(raw, orjson.loads(raw), ChatBody)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"temperature": 0, "temperature": 2}', "temperature"),
        ('{"temperature":0,"\\u0074emperature":2}', "temperature"),
        ('{"model": "a:b", "top_p": 1, "top_p": 1}', "top_p"),
        ('{"messages": [{"role": "user", "content": "\\\\\\":", "role": "system"}]}', "role"),
        ('{"stream_options": {"include_usage": true, "include_usage": false}}', "include_usage"),
        ('{"metadata": {"secret": 1, "secret": 2}}', None),
        ('{"a": {"b": [[{"c": {}, "c": {}}]]}}', None),
        ('{"": 1, "": 2}', None),
        ('{"seed": 1, "x": "' + "a:" * 300_000 + '", "seed": 2}', None),
    ],
)
def test_keys_that_stand_twice(text: str, param: str | None) -> None:
    error = refusal(text)
    assert error is not None and (error.status, error.param, error.code) == (400, param, "invalid_json")
    assert "secret" not in error.message


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"a": 1}',
        '{"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 2}]}',
        '{"a": ":::", "b": "\\":\\\\"}',
        '{"a": "\\\\", "b": "\\\\\\":"}',
        '{"a:": 1, "a": 2, "\\":": 3}',
        '{"a": 1, "A": 2, "a ": 3}',
    ],
)
def test_keys_that_do_not(text: str) -> None:
    assert refusal(text) is None


def test_random_bodies() -> None:
    rng = random.Random(5)
    alphabet = ['"', "\\", ":", "a", "é", "\n", " ", "{", "}", ",", "[", "]", "\U0001f680"]

    def text() -> str:
        return "".join(rng.choices(alphabet, k=rng.randint(0, 6)))

    def value(depth: int) -> Any:
        kind = rng.randint(0, 4 if depth else 2)
        if kind < 3:
            return [text(), rng.random(), None][kind]
        if kind == 3:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return {text(): value(depth - 1) for _ in range(rng.randint(0, 4))}

    for number in range(400):
        body = {"k": value(4), "l": text(), "s": "x:" * (300_000 if number % 100 == 0 else 0)}
        raw = json.dumps(body, ensure_ascii=bool(number % 2))
        assert refusal(raw) is None
        assert refusal(raw[:-1] + ', "k": 1}') is not None


def test_a_server_refuses_them(server: Running) -> None:
    with server.client() as client:
        for path, field in (
            ("/v1/chat/completions", "temperature"),
            ("/v1/completions", "prompt"),
            ("/v1/responses", "input"),
            ("/v1/messages", "max_tokens"),
            ("/tokenize", "prompt"),
            ("/detokenize", "tokens"),
        ):
            raw = f'{{"{field}": 1, "x": {{}}, "{field}": 1}}'
            answer = client.post(path, content=raw, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400
            assert f"{field}: this key stands twice" in answer.json()["error"]["message"]
