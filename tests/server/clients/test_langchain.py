"""LangChain's ChatOpenAI, told nothing but the address."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import pytest

from tests.server.serving import Running

ASK = "Say something."


class Forecast(pydantic.BaseModel):
    """The weather of one city."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 3]


def chat(running: Running, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        base_url=f"{running.url}/v1",
        api_key="none",
        model="alias",
        max_retries=0,
        timeout=120.0,
        **{"max_tokens": 20, "temperature": 0.0, **options},
    )


def test_invoke_and_stream_agree_and_count_tokens(server: Running) -> None:
    model = chat(server, stream_usage=True)
    whole = model.invoke(ASK)
    chunks = list(model.stream(ASK))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert whole.content and total.content == whole.content and len(chunks) > 3
    assert whole.usage_metadata["output_tokens"] == total.usage_metadata["output_tokens"] == 20
    assert whole.usage_metadata["input_tokens"] == total.usage_metadata["input_tokens"] > len(ASK)
    assert whole.response_metadata["finish_reason"] == total.response_metadata["finish_reason"] == "length"
    assert whole.response_metadata["model_name"] == "tiny-chat", "the model's own name, by whichever it was asked"


@pytest.mark.parametrize("choice", ["any", "Forecast"])
def test_bound_tools_are_called_and_answered(server: Running, compact: dict[str, int], choice: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = chat(server, max_tokens=400, logit_bias=compact)
    bound = model.bind_tools([Forecast], tool_choice=choice, strict=True, parallel_tool_calls=False)
    answer = bound.invoke(ASK)
    (call,) = answer.tool_calls
    assert call["name"] == "Forecast" and Forecast(**call["args"]) and call["id"] and not answer.invalid_tool_calls
    chunks = list(bound.stream(ASK))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert [(found["name"], found["args"]) for found in total.tool_calls] == [(call["name"], call["args"])]
    brief = chat(server)
    later = brief.bind_tools([Forecast], tool_choice="none").invoke(
        [HumanMessage(ASK), answer, ToolMessage("rain", tool_call_id=call["id"])]
    )
    without = brief.invoke(ASK).usage_metadata["input_tokens"]
    assert not later.tool_calls and later.usage_metadata["input_tokens"] > without + len('Forecast"city""days"rain')


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_has_its_form(server: Running, compact: dict[str, int], method: str) -> None:
    model = chat(server, max_tokens=300, logit_bias=compact)
    asked = model.with_structured_output(Forecast, method=method, strict=True, include_raw=True)
    found = asked.invoke(ASK)
    assert isinstance(found["parsed"], Forecast) and found["parsing_error"] is None


def test_thoughts_are_not_content(thinking: Running) -> None:
    answer = chat(thinking).invoke(ASK)
    assert answer.content == "" and answer.usage_metadata["output_token_details"]["reasoning"] > 0
    plain = chat(thinking, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).invoke(ASK)
    assert plain.content and plain.usage_metadata["output_token_details"]["reasoning"] == 0


def test_responses_are_an_api_it_can_be_told_to_use(server: Running) -> None:
    answer, plain = chat(server, use_responses_api=True).invoke(ASK), chat(server).invoke(ASK)
    assert answer.text == plain.text and answer.usage_metadata["output_tokens"] == 20


def test_batches_are_answered_in_order(server: Running) -> None:
    model = chat(server)
    questions = ["one", "two", "three", "four"]
    found = [answer.content for answer in model.batch(questions)]
    assert found == [model.invoke(question).content for question in questions] and len(set(found)) == 4
