"""openai-python's chat completions: what it parses, accumulates and gives back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import pytest

from tests.server.serving import Running

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = "tiny-chat"
MESSAGES: Any = [{"role": "user", "content": "Say something."}]
GREEDY: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
LONG: Any = {**GREEDY, "max_tokens": 400}


class Forecast(pydantic.BaseModel):
    """The weather of one city."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 3]


class Verdict(pydantic.BaseModel):
    answer: Literal["yes", "no"]


@pytest.fixture
def sdk(server: Running) -> Iterator[OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
        yield client


@pytest.fixture
def forecast_tool() -> Any:
    import openai

    return openai.pydantic_function_tool(Forecast)


def test_a_stream_gives_the_whole_answer_and_its_usage(sdk: OpenAI) -> None:
    whole = sdk.chat.completions.create(**GREEDY)
    chunks = list(sdk.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert whole.object == "chat.completion" and whole.model == MODEL and whole.choices[0].finish_reason == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert not chunks[-1].choices and all(chunk.usage is None for chunk in chunks[:-1])
    for used in (whole.usage, chunks[-1].usage):
        assert used is not None and used.completion_tokens == 24
        assert used.total_tokens == used.prompt_tokens + 24 and used.prompt_tokens > len(MESSAGES[0]["content"])
        assert used.prompt_tokens_details is not None and used.completion_tokens_details is not None
        assert used.completion_tokens_details.reasoning_tokens == 0
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {(chunks[0].id, chunks[0].created, MODEL)}


def test_seeded_answers_come_again_and_differ_among_each_other(sdk: OpenAI) -> None:
    ask = {**GREEDY, "temperature": 1.0, "n": 3, "seed": 11}
    first, again = (sdk.chat.completions.create(**ask) for _ in range(2))
    other = sdk.chat.completions.create(**{**ask, "seed": 12})
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]
    assert texts != [choice.message.content for choice in other.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text(sdk: OpenAI, server: Running, stream: bool) -> None:
    # Control tokens are no text, so they may not be chosen here.
    unwanted = {str(token): -100 for token in range(256, server.server.served.vocab_size)}
    ask = {**GREEDY, "logprobs": True, "top_logprobs": 20, "logit_bias": unwanted}
    if stream:
        tokens, text = [], ""
        for chunk in sdk.chat.completions.create(**ask, stream=True):
            text += chunk.choices[0].delta.content or ""
            if chunk.choices[0].logprobs is not None:
                tokens += chunk.choices[0].logprobs.content or []
    else:
        choice = sdk.chat.completions.create(**ask).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        tokens, text = choice.logprobs.content, choice.message.content or ""
    assert len(tokens) == 24
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode(errors="replace") == text
    for token in tokens:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 20 and values == sorted(values, reverse=True) and values[0] <= 0
        # They are the model's own, before any bias: the likeliest that may be chosen was.
        first = next(top for top in token.top_logprobs if len(top.bytes or ()) == 1)
        assert (token.token, token.logprob) == (first.token, first.logprob)


def test_an_answer_ends_before_its_stop(sdk: OpenAI) -> None:
    text = sdk.chat.completions.create(**GREEDY).choices[0].message.content or ""
    stop = text[9:11]
    for stops in (stop, ["never said", stop]):
        choice = sdk.chat.completions.create(**GREEDY, stop=stops).choices[0]
        assert choice.finish_reason == "stop" and choice.message.content == text.split(stop)[0]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Forecast"}}])
def test_a_tool_is_called_and_its_result_is_read(
    sdk: OpenAI, forecast_tool: Any, compact: dict[str, int], choice: Any
) -> None:
    answer = sdk.chat.completions.create(
        **LONG, tools=[forecast_tool], tool_choice=choice, parallel_tool_calls=False, logit_bias=compact
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    assert message.tool_calls is not None and len(message.tool_calls) == 1
    call = message.tool_calls[0]
    assert call.type == "function" and call.function.name == "Forecast"
    Forecast.model_validate_json(call.function.arguments)
    # The turns go back as the client keeps them.
    turns = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    later = sdk.chat.completions.create(**{**GREEDY, "messages": turns}, tools=[forecast_tool], tool_choice="none")
    assert later.usage is not None and answer.usage is not None
    assert later.choices[0].message.tool_calls is None
    assert later.usage.prompt_tokens > len(call.function.arguments) + len("Say something.rain")


def test_a_schema_is_followed_and_parsed(sdk: OpenAI, compact: dict[str, int]) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "v", "strict": True, "schema": Verdict.model_json_schema()},
    }
    ask = {**LONG, "temperature": 1.0, "seed": 4, "logit_bias": compact}
    plain = sdk.chat.completions.create(**ask, response_format=form).choices[0]
    assert Verdict.model_validate_json(plain.message.content or "").answer in ("yes", "no")
    parsed = sdk.chat.completions.parse(**ask, response_format=Verdict).choices[0].message.parsed
    assert isinstance(parsed, Verdict)


def test_a_cut_answer_is_told_to_the_parser(sdk: OpenAI) -> None:
    import openai

    with pytest.raises(openai.LengthFinishReasonError):
        sdk.chat.completions.parse(**{**GREEDY, "max_tokens": 3}, response_format=Verdict)


def test_tools_are_parsed_into_their_models(sdk: OpenAI, forecast_tool: Any, compact: dict[str, int]) -> None:
    answer = sdk.chat.completions.parse(
        **LONG, tools=[forecast_tool], tool_choice="required", parallel_tool_calls=False, logit_bias=compact
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None and isinstance(calls[0].function.parsed_arguments, Forecast)


def test_the_stream_helper_accumulates_text(sdk: OpenAI) -> None:
    # It has no answer to give when one was cut off, so this one ends at a stop.
    text = sdk.chat.completions.create(**GREEDY).choices[0].message.content or ""
    ask = {**GREEDY, "stop": text[-6:-4]}
    whole = sdk.chat.completions.create(**ask).choices[0]
    with sdk.chat.completions.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert len(deltas) > 1 and "".join(deltas) == whole.message.content == final.choices[0].message.content
    done = [event for event in events if event.type == "content.done"]
    assert [event.content for event in done] == [whole.message.content]
    assert final.choices[0].finish_reason == "stop"


def test_the_stream_helper_accumulates_calls_and_parsed_answers(
    sdk: OpenAI, forecast_tool: Any, compact: dict[str, int]
) -> None:
    ask = {**LONG, "logit_bias": compact}
    with sdk.chat.completions.stream(
        **ask, tools=[forecast_tool], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert isinstance(done.parsed_arguments, Forecast) and done.name == "Forecast"
    assert "".join(delta.arguments_delta for delta in deltas) == done.arguments
    calls = final.choices[0].message.tool_calls
    assert calls is not None and calls[0].function.parsed_arguments == done.parsed_arguments and calls[0].id
    assert final.choices[0].finish_reason == "tool_calls"
    with sdk.chat.completions.stream(**ask, response_format=Verdict) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Verdict)


def test_extra_parameters_reach_the_sampler(sdk: OpenAI, compact: dict[str, int]) -> None:
    greedy = sdk.chat.completions.create(**GREEDY).choices[0].message.content
    free = {**GREEDY, "temperature": 1.5, "seed": 1}

    def say(**extra: Any) -> str | None:
        return sdk.chat.completions.create(**free, extra_body=extra).choices[0].message.content

    assert say(top_k=0) != greedy
    assert say(top_k=1) == greedy
    assert say(top_k=0, min_p=1.0) == greedy
    assert say(top_k=1, repetition_penalty=5.0) != greedy
    found = json.loads(
        sdk.chat.completions.create(
            **{**LONG, "logit_bias": compact}, extra_body={"guided_json": Verdict.model_json_schema()}
        )
        .choices[0]
        .message.content
        or ""
    )
    assert found["answer"] in ("yes", "no")


def test_raw_answers_carry_the_request_id(sdk: OpenAI) -> None:
    raw = sdk.chat.completions.with_raw_response.create(**GREEDY, extra_headers={"X-Request-Id": "from-the-client-1"})
    assert raw.headers["x-request-id"] == "from-the-client-1" == raw.request_id
    assert raw.headers["content-type"] == "application/json" and raw.http_version == "HTTP/1.1"
    assert raw.parse().choices[0].message.content
    first, second = (sdk.chat.completions.create(**GREEDY)._request_id for _ in range(2))
    assert first and second and first != second
    with sdk.chat.completions.with_streaming_response.create(**GREEDY, stream=True) as raw_stream:
        assert raw_stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in raw_stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


def test_reasoning_is_apart_from_content(thinking: Running, compact: dict[str, int]) -> None:
    import openai

    # The token that ends the thought, far likelier than any other; the grammar then takes it away.
    end = thinking.server.served.think_end[0]
    ask: Any = {"model": None, "messages": MESSAGES, "max_tokens": 200, "temperature": 0}
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as sdk:
        thought = sdk.chat.completions.create(**{**ask, "max_tokens": 20}).choices[0].message
        chunks = list(sdk.chat.completions.create(**{**ask, "max_tokens": 20}, stream=True))
        both = sdk.chat.completions.create(
            **ask, logit_bias={**compact, str(end): 100}, extra_body={"guided_json": Verdict.model_json_schema()}
        )
        without = sdk.chat.completions.create(
            **{**ask, "max_tokens": 20}, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
        )
    said: Any = thought
    assert said.reasoning_content and said.reasoning == said.reasoning_content and said.content is None
    streamed = [getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks]
    assert "".join(streamed) == said.reasoning_content
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert Verdict.model_validate_json(both.choices[0].message.content or "")
    assert without.choices[0].message.content and not hasattr(without.choices[0].message, "reasoning_content")
    num_thought = []
    for answer in (both, without):
        assert answer.usage is not None and answer.usage.completion_tokens_details is not None
        num_thought.append(answer.usage.completion_tokens_details.reasoning_tokens or 0)
    assert both.usage is not None and 0 < num_thought[0] < both.usage.completion_tokens and num_thought[1] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_cancelled_request_leaves_its_slot(server: Running, num_aborted: Callable[[], int], stream: bool) -> None:
    import openai

    long = {**GREEDY, "max_tokens": 1_900, "extra_body": {"ignore_eos": True}}

    async def begin_and_leave() -> int:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
            if stream:
                answer: Any = await sdk.chat.completions.create(**long, stream=True)
                async for chunk in answer:
                    if chunk.choices[0].delta.content:
                        break
                num_running = server.gauges().num_running
                await answer.close()
                return num_running
            task = asyncio.create_task(sdk.chat.completions.create(**long))
            while not server.gauges().num_running:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return 1

    before = num_aborted()
    assert asyncio.run(begin_and_leave()) == 1
    end = time.monotonic() + 10.0
    while server.gauges().num_running and time.monotonic() < end:
        time.sleep(0.005)
    assert server.gauges().num_running == 0
    assert num_aborted() == before + 1, "it did not run to its end"
