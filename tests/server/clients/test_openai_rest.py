"""openai-python's text completions, models, and the exceptions that it makes of errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from qnext.server.access.keys import Key, KeyRing, KeyStore
from qnext.server.limits import Limits
from tests.pace import in_time
from tests.server.serving import Running, running_server

if TYPE_CHECKING:
    from openai import OpenAI

MODEL = "tiny-chat"
ASK: Any = {"model": MODEL, "prompt": "def main(", "max_tokens": 12, "temperature": 0}
CHAT: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


class Calls:
    """openai-python with a list of the statuses that it got, retries included."""

    def __init__(self, running: Running, *, key: str = "none", max_retries: int = 0) -> None:
        import openai

        self.statuses: list[int] = []
        hooks = {"response": [lambda response: self.statuses.append(response.status_code)]}
        self.sdk = openai.OpenAI(
            base_url=f"{running.url}/v1",
            api_key=key,
            max_retries=max_retries,
            timeout=60.0,
            http_client=httpx2.Client(event_hooks=hooks),
        )


@pytest.fixture
def sdk(server: Running) -> Iterator[OpenAI]:
    with Calls(server).sdk as client:
        yield client


class Guarded:
    """A server with keys, and a key of each kind."""

    def __init__(self, running: Running, limited: Key, secrets: dict[str, str]) -> None:
        self.running = running
        self.limited = limited
        self.secrets = secrets


@pytest.fixture(scope="module")
def guarded(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    store = KeyStore(tmp_path_factory.mktemp("keys") / "keys.json")
    limited, secret = store.create("limited", requests_per_minute=60)
    secrets = {
        "limited": secret,
        "narrow": store.create("narrow", scopes=frozenset({"metrics"}))[1],
        "other": store.create("other", models=("another",))[1],
    }
    with running_server(chat_model, keys=KeyRing(store.path), limits=Limits(drain_seconds=1.0)) as running:
        yield Guarded(running, limited, secrets)


def test_a_completion_whole_and_streamed(sdk: OpenAI) -> None:
    whole = sdk.completions.create(**ASK, logprobs=2, echo=True)
    chunks = list(
        sdk.completions.create(**ASK, logprobs=2, echo=True, stream=True, stream_options={"include_usage": True})
    )
    assert whole.choices[0].text.startswith("def main(") and whole.choices[0].finish_reason == "length"
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}, "it ends once, behind its whole text"
    assert whole.usage is not None and chunks[-1].usage is not None
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 12
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens == len("def main(")
    logged = whole.choices[0].logprobs
    parts = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
    assert logged is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts for value in getattr(part, name)]
        assert joined == getattr(logged, name) and len(joined) == len("def main(") + 12, name
    assert logged.token_logprobs is not None and logged.token_logprobs[0] is None
    assert logged.tokens is not None and "".join(logged.tokens[:9]) == "def main("
    assert logged.text_offset is not None and logged.text_offset[:10] == list(range(10))


def test_a_list_of_prompts_has_choices_in_order(sdk: OpenAI, server: Running) -> None:
    encode = server.server.served.tokenizer.encode
    texts = ["one", "two and more", "three"]
    alone = [sdk.completions.create(**{**ASK, "prompt": text}).choices[0].text for text in texts]
    for prompts in (texts, [encode(text) for text in texts]):
        answer = sdk.completions.create(**{**ASK, "prompt": prompts})
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, texts))
    twice = sdk.completions.create(**{**ASK, "prompt": texts[:2], "n": 2, "temperature": 1.0, "seed": 3})
    assert [choice.index for choice in twice.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in twice.choices}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_ends_at_its_stop_at_once(sdk: OpenAI, stream: bool) -> None:
    text = sdk.completions.create(**ASK).choices[0].text
    ask = {**ASK, "max_tokens": 1_000, "stop": text[4:6]}

    def attempt() -> float:
        started = time.monotonic()
        if stream:
            choices = [choice for chunk in sdk.completions.create(**ask, stream=True) for choice in chunk.choices]
        else:
            choices = sdk.completions.create(**ask).choices
        assert "".join(choice.text for choice in choices) == text.split(text[4:6])[0]
        assert choices[-1].finish_reason == "stop"
        return time.monotonic() - started

    in_time(Limits.ping_seconds / 2, attempt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_slots_of_all_its_prompts(
    server: Running, num_aborted: Callable[[], int], stream: bool
) -> None:
    import openai

    async def begin_and_leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
            ask = sdk.completions.create(
                model=MODEL,
                prompt=["one", "two", "three"],
                max_tokens=1_900,
                stream=stream,
                extra_body={"ignore_eos": True},
            )
            task = asyncio.create_task(ask)
            while server.gauges().num_running < 3:
                await asyncio.sleep(0.005)
            if stream:
                await (await task).close()
            else:
                task.cancel()
                await asyncio.wait((task,))

    before = num_aborted()
    asyncio.run(begin_and_leave())
    end = time.monotonic() + 10.0
    while server.gauges().num_running and time.monotonic() < end:
        time.sleep(0.005)
    assert server.gauges().num_running == 0 and num_aborted() == before + 3


def test_responses_answer_as_chat_completions_do(sdk: OpenAI) -> None:
    chat = sdk.chat.completions.create(**{**CHAT, "max_tokens": 16}, temperature=0)
    whole = sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=16, temperature=0)
    events = list(sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=16, temperature=0, stream=True))
    assert whole.output_text == chat.choices[0].message.content and whole.status == "incomplete"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert whole.usage is not None and chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens and whole.usage.output_tokens == 16


def test_models_are_listed_and_found(sdk: OpenAI) -> None:
    import openai

    found = list(sdk.models.list())
    assert [model.id for model in found] == [MODEL, "alias"] and found[0].object == "model"
    assert sdk.models.retrieve("alias").id == "alias" and found[0].created > 1_700_000_000
    assert sdk.chat.completions.create(**{**CHAT, "model": "alias"}).model == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        sdk.models.retrieve("another/model")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 4_000}]}, "messages", "context_length_exceeded"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"extra_body": {"top_k": "many"}}, "top_k", "invalid_value"),
    ],
)
def test_faults_of_the_request_are_bad_requests(sdk: OpenAI, change: dict[str, Any], param: str, code: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as error:
        sdk.chat.completions.create(**{**CHAT, **change})
    assert (error.value.param, error.value.code) == (param, code)
    assert error.value.type == "invalid_request_error" and error.value.request_id


def test_an_unknown_model_is_not_found(sdk: OpenAI) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as error:
        sdk.chat.completions.create(**{**CHAT, "model": "gpt-4o"})
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_keys_are_asked_for(guarded: Guarded) -> None:
    import openai

    for key, kind in (
        ("sk-wrong", openai.AuthenticationError),
        (guarded.secrets["narrow"], openai.PermissionDeniedError),
        (guarded.secrets["other"], openai.PermissionDeniedError),
    ):
        calls = Calls(guarded.running, key=key, max_retries=2)
        with pytest.raises(kind):
            calls.sdk.chat.completions.create(**CHAT)
        assert len(calls.statuses) == 1, "a refused key is not tried again"


def test_a_rate_limit_says_when_to_come_again_and_the_client_does(guarded: Guarded) -> None:
    import openai

    running, key = guarded.running, guarded.limited

    def use_all() -> None:
        while running.server.rates.check(key, 1) is None:
            running.server.rates.finish(key, 1, 1)

    running.call(use_all)
    calls = Calls(running, key=guarded.secrets["limited"])
    with pytest.raises(openai.RateLimitError) as error:
        calls.sdk.chat.completions.create(**CHAT)
    assert error.value.code == "rate_limit_exceeded" and int(error.value.response.headers["retry-after"]) >= 1
    patient = Calls(running, key=guarded.secrets["limited"], max_retries=2)
    running.call(use_all)
    started = time.monotonic()
    assert patient.sdk.chat.completions.create(**CHAT).choices
    assert patient.statuses == [429, 200] and time.monotonic() - started >= 1.0


def test_what_would_fail_again_is_not_tried_again(
    chat_model: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    long: Any = {**CHAT, "max_tokens": 1_900, "extra_body": {"ignore_eos": True}}
    with running_server(chat_model, limits=Limits(request_seconds=0.2, drain_seconds=1.0)) as running:
        calls = Calls(running, max_retries=2)
        with pytest.raises(openai.InternalServerError) as late:
            calls.sdk.chat.completions.create(**long)
    assert late.value.code == "request_timeout" and calls.statuses == [504]

    def fault(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("a fault that no request can cause")

    monkeypatch.setattr("qnext.server.surfaces.opening.sampling_params", fault)
    calls = Calls(server, max_retries=2)
    with pytest.raises(openai.InternalServerError) as broken:
        calls.sdk.chat.completions.create(**CHAT)
    assert broken.value.code == "internal_error" and calls.statuses == [500]


def test_an_error_in_a_stream_is_an_exception(chat_model: Path) -> None:
    import openai

    long: Any = {**CHAT, "max_tokens": 1_900, "extra_body": {"ignore_eos": True}}
    with running_server(chat_model, limits=Limits(request_seconds=0.3, drain_seconds=1.0)) as running:
        seen = 0
        with pytest.raises(openai.APIError) as error:
            for _ in Calls(running).sdk.chat.completions.create(**long, stream=True):
                seen += 1
    assert seen > 1 and error.value.code == "request_timeout"
