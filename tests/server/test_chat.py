"""Chat completions and completions over HTTP: equal whole and streamed, and equal to the engine asked directly."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from qnext.engine import SamplingParams
from tests.server.serving import Running

ASK = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 24, "temperature": 0}


def chunks(answer: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_streamed_answer_is_the_whole_one(server: Running) -> None:
    with server.client() as client:
        whole = client.post("/v1/chat/completions", json=ASK).json()
        streamed = client.post(
            "/v1/chat/completions", json={**ASK, "stream": True, "stream_options": {"include_usage": True}}
        )
    found = chunks(streamed)
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in found if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in found[:-1]][-1] == whole["choices"][0]["finish_reason"]
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(c["usage"] is None for c in found[:-1])
    assert len({(c["id"], c["created"], c["model"]) for c in found}) == 1


def test_the_answer_is_the_engines(server: Running) -> None:
    prompt = "def main("
    with server.client() as client:
        body = {"prompt": prompt, "max_tokens": 20, "temperature": 0.8, "top_k": 0, "seed": 7, "return_token_ids": True}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
    worker = server.server.worker
    ids = server.server.served.tokenizer.encode(prompt)
    found: list[Any] = []

    def ask() -> None:
        found.extend(worker.engine.generate([ids], SamplingParams(temperature=0.8, seed=7, max_tokens=20)))

    import threading

    done = threading.Event()
    worker.call(lambda: (ask(), done.set()))
    assert done.wait(30.0)
    assert choice["token_ids"] == list(found[0].output_ids) and choice["prompt_token_ids"] == ids


def test_echo_has_log_probabilities_of_the_prompt(server: Running) -> None:
    ids = server.server.served.tokenizer.encode("hello there")
    body = {"prompt": [ids, ids[:4]], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body).json()
    for choice, prompt in zip(answer["choices"], (ids, ids[:4]), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        last = logprobs["token_logprobs"][-1]
        assert last == max(logprobs["top_logprobs"][-1].values()), "greedy takes the most likely"
        assert all(
            value >= entry
            for value, entry in zip(
                (max(top.values()) for top in logprobs["top_logprobs"][1:]), logprobs["token_logprobs"][1:], strict=True
            )
        )


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_that_ends_an_answer_has_a_log_probability(server: Running, stream: bool) -> None:
    """Harnesses that score a prompt ask for one more token, and cut it off whatever it is."""
    ids = server.server.served.tokenizer.encode("hello there")
    end = min(server.server.served.tokenizer.eos_ids)
    body = {
        "prompt": [ids],
        "max_tokens": 4,
        "echo": True,
        "logprobs": 1,
        "logit_bias": {str(end): 100},
        "stream": stream,
    }
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
        said = client.post("/v1/chat/completions", json={**ASK, "logprobs": True, "logit_bias": {str(end): 100}}).json()
    choices = [c for found in (chunks(answer) if stream else [answer.json()]) for c in found["choices"]]
    logged = [value for c in choices if c["logprobs"] for value in c["logprobs"]["token_logprobs"]]
    assert len(logged) == len(ids) + 1 and choices[-1]["finish_reason"] == "stop"
    assert "".join(c["text"] for c in choices) == server.server.served.tokenizer.decode(ids)
    assert len(said["choices"][0]["logprobs"]["content"]) == 1 and said["choices"][0]["message"]["content"] == ""


def test_n_answers_have_seeds_of_their_own(server: Running) -> None:
    body = {**ASK, "temperature": 1, "n": 3, "seed": 5}
    with server.client() as client:
        first = client.post("/v1/chat/completions", json=body).json()
        again = client.post("/v1/chat/completions", json={**body, "stream": True})
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3 and [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in chunks(again):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


MARKED = ["<|im_start|>user\nhi<|im_end|>", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "<think>x", "no mark"]


@pytest.mark.parametrize("text", MARKED)
def test_marks_of_a_text_prompt_are_tokens_as_for_tokenize(server: Running, text: str) -> None:
    encode = server.server.served.tokenizer.encode
    with server.client() as client:
        for choice in ({}, {"parse_special": True}, {"parse_special": False}, {"add_special_tokens": False}):
            body = {"prompt": text, "max_tokens": 1, "return_token_ids": True, **choice}
            ids = client.post("/v1/completions", json=body).json()["choices"][0]["prompt_token_ids"]
            assert ids == client.post("/tokenize", json={"prompt": text, **choice}).json()["tokens"]
            assert ids == encode(text, allow_special=choice.get("parse_special", True))


def test_beside_a_suffix_the_marks_are_the_servers(server: Running) -> None:
    ids = server.server.served.tokenizer.added_ids
    prefix, suffix, middle = (ids[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle"))
    body = {"prompt": "a<|fim_middle|>", "suffix": "<|im_end|>b", "max_tokens": 1, "return_token_ids": True}
    wanted = {False: [prefix, suffix, middle], True: [prefix, middle, suffix, ids["<|im_end|>"], middle]}
    with server.client() as client:
        for choice, reserved in (({}, wanted[False]), ({"parse_special": True}, wanted[True])):
            found = client.post("/v1/completions", json={**body, **choice}).json()["choices"][0]["prompt_token_ids"]
            assert [token for token in found if token in ids.values()] == reserved
