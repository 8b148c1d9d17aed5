"""What agents and libraries send beside text and tools: names of models, fields without effect, wishes for tokens."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.server.agents import CHAT, MESSAGES, RESPONSES, ignored, post
from tests.server.serving import Running


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
        (
            RESPONSES,
            {"store": False, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k"},
            {"include", "prompt_cache_key"},
        ),
        (
            RESPONSES,
            {"text": {"verbosity": "low"}, "reasoning": {"summary": "detailed"}, "truncation": "auto"},
            {"text.verbosity", "reasoning.summary", "truncation"},
        ),
        (
            MESSAGES,
            {"metadata": {"user_id": "u"}, "context_management": {"edits": []}, "mcp_servers": [{"url": "x"}]},
            {"metadata", "context_management", "mcp_servers"},
        ),
        (MESSAGES, {"metadata": None, "service_tier": "auto", "thinking": None}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_fields_without_effect_are_named(server: Running, path: str, more: dict[str, Any], expected: set[str]) -> None:
    asked = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user", "content": "hi"}]}
    assert ignored(post(server, path, **asked, **more)) == expected


@pytest.mark.parametrize(
    "more",
    [
        {"use_beam_search": True},
        {"truncate_prompt_tokens": 5},
        {"logits_processors": ["x"]},
        {"audio": {"voice": "a"}},
        {"include_stop_str_in_output": True},
        {"n_predict": 5},
        {"echo": True},
        {"prompt_logprobs": 1, "stream": True},
    ],
    ids=str,
)
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
