"""Fields of requests: each works, is refused with its name, or is named as without effect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anthropic.types.beta.message_create_params as anthropic_beta
import anthropic.types.message_count_tokens_params as anthropic_count
import anthropic.types.message_create_params as anthropic_messages
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completions
import openai.types.responses.response_create_params as openai_responses
import pytest
from pydantic import BaseModel

import qnext.server
from qnext.server.body.foreign_fields import REFUSED, WITHOUT_EFFECT
from qnext.server.surfaces.anthropic.bodies import CountBody, MessagesBody
from qnext.server.surfaces.openai.chat_bodies import ChatBody
from qnext.server.surfaces.openai.completions import CompletionBody
from qnext.server.surfaces.openai.responses_bodies import ResponseBody
from tests.server.agents import CHAT, MESSAGES, RESPONSES, ignored, post
from tests.server.serving import Running

COMPLETIONS, COUNT = "/v1/completions", "/v1/messages/count_tokens"
BODIES: dict[str, type[BaseModel]] = {
    CHAT: ChatBody,
    COMPLETIONS: CompletionBody,
    RESPONSES: ResponseBody,
    MESSAGES: MessagesBody,
    COUNT: CountBody,
}
OFFICIAL: dict[str, tuple[type, ...]] = {
    CHAT: (openai_chat.CompletionCreateParamsBase,),
    COMPLETIONS: (openai_completions.CompletionCreateParamsBase,),
    RESPONSES: (openai_responses.ResponseCreateParamsBase,),
    MESSAGES: (anthropic_messages.MessageCreateParamsBase, anthropic_beta.MessageCreateParamsBase),
    COUNT: (anthropic_count.MessageCountTokensParams,),
}
# Of other servers: vLLM, SGLang, llama.cpp, Ollama, OpenRouter.
OTHERS = """
n_predict num_predict cache_prompt mirostat mirostat_tau typical_p dry_multiplier dry_base samplers id_slot n_keep
skip_special_tokens truncate_prompt_tokens documents mm_processor_kwargs priority include_reasoning vllm_xargs
use_beam_search length_penalty include_stop_str_in_output structural_tag ebnf lora_path top_a keep_alive options
format think provider transforms route plugins thinking_budget do_sample num_beams
"""
SAMPLES: tuple[Any, ...] = ("zq-sample", True, {"zq": 1})
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 2},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": [{"role": "user", "content": "hi"}]},
    COUNT: {"messages": [{"role": "user", "content": "hi"}], "model": "alias"},
}


def official(path: str) -> set[str]:
    return {name for kind in OFFICIAL[path] for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}


def declared(path: str) -> set[str]:
    return {field.alias or name for name, field in BODIES[path].model_fields.items()}


@pytest.mark.parametrize("path", BODIES)
def test_every_field_of_the_official_clients(server: Running, path: str) -> None:
    """What no body declares is named to the client, or refused by its name, whatever its value."""
    names = (official(path) | ({*OTHERS.split()} if path in (CHAT, COMPLETIONS) else set())) - declared(path)
    assert len(names) > 2
    for value in SAMPLES:
        for name in sorted(names):
            answer = post(server, path, **ASKED[path], **{name: value})
            if answer.status_code == 400:
                assert name in REFUSED[path] and answer.json()["error"]["param"] == name
            else:
                neutral = WITHOUT_EFFECT[path].get(name, REFUSED.get(path, {}).get(name))
                assert ignored(answer) == {name} or (neutral is not None and value in neutral.neutral), (name, value)


@pytest.mark.parametrize("path", BODIES)
def test_every_declared_field_is_read(path: str) -> None:
    """Or stands in a table of those without effect."""
    folder = Path(qnext.server.__file__).parent
    source = "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    unread = [
        name
        for name in BODIES[path].model_fields
        if name not in WITHOUT_EFFECT[path]
        and not re.search(
            rf"\bbody(?:\.\w+)*\.{name}\b|\bself\.{name}\b|(?:_PLAIN =|for name in) [^)]*\"{name}\"", source
        )
    ]
    assert unread == []


@pytest.mark.parametrize(
    ("path", "more", "expected"),
    [
        (CHAT, {"stream": True, "stream_options": {"include_usage": True, "more": 1}}, {"stream_options.more"}),
        (CHAT, {"structured_outputs": {"choice": ["a"], "backend": "x"}}, {"structured_outputs.backend"}),
        (CHAT, {"reasoning": {"effort": "none", "exclude": True}}, {"reasoning.exclude"}),
        (CHAT, {"response_format": {"type": "json_object", "more": {}}}, {"response_format.more"}),
        (
            RESPONSES,
            {"reasoning": {"effort": "low", "mode": "x"}, "text": {"more": None}},
            {"reasoning.mode", "reasoning_effort"},
        ),
        (MESSAGES, {"output_config": {"effort": "none", "task_budget": {"total": 5}}}, {"output_config.task_budget"}),
        (MESSAGES, {"output_config": {"effort": "low"}}, {"reasoning_effort"}),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 9}}, {"enable_thinking", "thinking_budget"}),
        (CHAT, {"chat_template_kwargs": {"thinking": True}}, {"thinking"}),
        (CHAT, {"chat_template_kwargs": {"thinking": False, "thinking_budget": None}}, set()),
        ("/tokenize", {"chat_template_kwargs": {"thinking_budget": 5}}, {"thinking_budget"}),
        (MESSAGES, {"thinking": {"type": "adaptive", "more": 1}}, {"thinking.more"}),
        ("/tokenize", {"mm_processor_kwargs": {"a": 1}}, {"mm_processor_kwargs"}),
        ("/detokenize", {"tokens": [72], "skip_special_tokens": True}, {"skip_special_tokens"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_fields_inside_options_are_named(server: Running, path: str, more: dict[str, Any], expected: set[str]) -> None:
    asked = {} if path == "/detokenize" else ASKED.get(path, ASKED[CHAT])
    assert ignored(post(server, path, **asked, **more)) == expected


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT, "/tokenize"])
def test_a_prompt_that_would_be_cut_is_refused(server: Running, path: str) -> None:
    answer = post(server, path, **ASKED.get(path, ASKED[CHAT]), truncate_prompt_tokens=4)
    assert answer.status_code == 400 and "truncate_prompt_tokens is not served" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT, "/tokenize"])
def test_priority_is_named_as_without_effect(server: Running, path: str) -> None:
    assert "priority" in ignored(post(server, path, **ASKED.get(path, ASKED[CHAT]), priority=-5))


@pytest.mark.parametrize("value", [{"no_such": 1}, {"tools": []}, {"messages": []}, {"enable_thinking": "yes"}])
def test_arguments_of_the_template_that_cannot_work_are_refused(server: Running, value: dict[str, Any]) -> None:
    answer = post(server, CHAT, **ASKED[CHAT], chat_template_kwargs=value)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs"


def test_a_form_that_is_not_served_is_refused(server: Running) -> None:
    for more in ({"ebnf": 'root ::= "a"'}, {"structural_tag": {}}, {"structured_outputs": {"structural_tag": "{}"}}):
        (name,) = more
        answer = post(server, CHAT, **ASKED[CHAT], **more)
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(name)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"json_schema": {"type": "integer", "minimum": 7, "maximum": 7}}, 7),
        ({"json_schema": '{"const": "x"}'}, "x"),
        ({"regex": "7"}, 7),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 300, "logit_bias": {str(ord("}")): 50}}, {}),
        ({"structured_outputs": {"json": {"const": [1]}}}, [1]),
    ],
    ids=str,
)
def test_constraints_by_the_names_of_other_servers(server: Running, more: dict[str, Any], expected: Any) -> None:
    body = {**ASKED[CHAT], "temperature": 0, "max_tokens": 20, **more}
    answer = post(server, CHAT, **body).json()["choices"][0]["message"]["content"]
    assert json.loads(answer) == expected
    assert post(server, CHAT, **body, guided_choice=["a"]).status_code == 400


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_in_every_chunk(server: Running, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ASKED[path], "max_tokens": 5, "stream": True, "stream_options": options, "ignore_eos": True}
    lines = post(server, path, **body).text.split("\n\n")
    counts = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines if line.startswith("data: {")]
    assert counts == sorted(counts) and counts[-2:] == [5, 5] and len(set(counts)) > 2
