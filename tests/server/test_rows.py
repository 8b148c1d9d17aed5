"""Requests that break the engine's arithmetic, as clients see it: an error of their own, and a server that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qnext.engine.execution.executor import StepOutput
from qnext.engine.policy.step import SequencePlan, StepPlan
from tests.engine.executors import sampled
from tests.server.serving import Running, running_server

CULPRIT = 200  # a token that makes a prompt break
VICTIM = {"prompt": "The canary sings", "max_tokens": 12, "temperature": 0.9, "seed": 4, "logprobs": 2}
IsCulprit = Callable[[SequencePlan], bool]
Spoil = Callable[[StepPlan, StepOutput, IsCulprit], StepOutput]


@contextmanager
def spoiled(running: Running, spoil: Spoil) -> Iterator[None]:
    engine = running.server.worker.engine
    executor = engine.executor
    usual = executor.execute

    def is_culprit(sequence: SequencePlan) -> bool:
        return CULPRIT in engine.scheduler.sequences[sequence.request_id].request.prompt_ids

    executor.execute = lambda plan: spoil(plan, usual(plan), is_culprit)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del executor.execute


def raises(plan: StepPlan, output: StepOutput, is_culprit: IsCulprit) -> StepOutput:
    if any(map(is_culprit, plan.sequences)):
        raise RuntimeError("/secret/path is broken")
    return output


def gives_nan(plan: StepPlan, output: StepOutput, is_culprit: IsCulprit) -> StepOutput:
    logits_RY, first = output.logits_RY.clone(), 0
    for sequence in sampled(plan, output):
        end = first + 1 + sequence.num_drafts
        if is_culprit(sequence):
            logits_RY[first:end] = float("nan")
        first = end
    return output._replace(logits_RY=logits_RY)


def ask(running: Running, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    with running.client() as client:
        answer = client.post("/v1/completions", json=body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(raises, "internal error"), (gives_nan, "the model gave no finite numbers")],
    ids=["raises", "nan"],
)
def test_many_requests_that_break_end_alone(server: Running, spoil: Spoil, message: str) -> None:
    """Far more of them than an engine may fail for steps without counting as broken; nothing else runs between."""
    status, wanted = ask(server, VICTIM)
    assert status == 200
    bad = {**VICTIM, "prompt": [5, CULPRIT, 6]}
    with spoiled(server, spoil):
        for _ in range(9):
            status, answer = ask(server, bad)
            assert (status, answer["error"]["message"]) == (500, message)
        with ThreadPoolExecutor(9) as threads:
            found = list(threads.map(lambda n: ask(server, bad if n % 3 else VICTIM), range(12)))
    assert [status for status, _ in found] == [500 if n % 3 else 200 for n in range(12)]
    for n, (_, answer) in enumerate(found):
        if n % 3 == 0:
            assert answer["choices"][0]["text"] == wanted["choices"][0]["text"]
            logprobs = [
                answer["choices"][0]["logprobs"]["token_logprobs"],
                wanted["choices"][0]["logprobs"]["token_logprobs"],
            ]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert server.server.is_ready and not server.server.worker.is_broken
    assert ask(server, VICTIM)[1]["choices"] == wanted["choices"]


def test_a_stream_that_breaks_says_so(server: Running) -> None:
    def later(plan: StepPlan, output: StepOutput, is_culprit: IsCulprit) -> StepOutput:
        if any(is_culprit(s) and s.start + len(s.token_ids) >= s.num_prompt + 3 for s in plan.sequences):
            raise RuntimeError("broken")
        return output

    body = {"prompt": [5, CULPRIT, 6], "max_tokens": 30, "temperature": 0, "ignore_eos": True, "stream": True}
    with spoiled(server, later), server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "internal_error"


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_cannot_be_written_ends_its_request(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """A fault while an answer becomes text. A stream that has begun ends with an error; where the first tokens came to
    be written all at once, as on a busy machine, it has not begun, and the answer is an error as without a stream."""
    from qnext.text.stream import TextStream

    usual = TextStream.push

    def push(self: TextStream, token_id: int) -> str:
        if getattr(self, "num_pushed", 0) >= 4:
            raise AssertionError("no text")
        self.num_pushed = getattr(self, "num_pushed", 0) + 1  # type: ignore[attr-defined]
        return usual(self, token_id)

    body = {"prompt": "abc", "max_tokens": 30, "temperature": 0, "ignore_eos": True, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "push", push)
        with server.client() as client:
            for _ in range(20 if stream else 1):
                answer = client.post("/v1/completions", json=body)
                if answer.status_code == 200:
                    break
                assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    if stream:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        assert json.loads(events[-2])["error"]["code"] == "internal_error"
    else:
        assert answer.status_code == 500
    assert ask(server, VICTIM)[0] == 200


@pytest.mark.parametrize("spoil", ["raises", "nan"])
def test_an_engine_that_answers_nobody_is_broken(chat_model: Path, spoil: str) -> None:
    def all_fail(plan: StepPlan, output: StepOutput) -> StepOutput:
        if spoil == "raises":
            raise RuntimeError("the device is lost")
        return output._replace(logits_RY=output.logits_RY * float("nan"))

    with running_server(chat_model) as running:
        assert ask(running, VICTIM)[0] == 200
        with spoiled(running, all_fail):
            statuses = [ask(running, VICTIM)[0] for _ in range(8)]
            assert set(statuses) <= {500, 503} and statuses[0] == 500
            assert running.server.fault == "the engine has failed"
