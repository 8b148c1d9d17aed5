"""lm-evaluation-harness over HTTP: the scores, flags and answers that it gets in process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qnext.server.access.keys import KeyRing
from tests.server.serving import Running, running_server

if TYPE_CHECKING:
    from tests.server.clients.in_process import InProcess

MODEL = "tiny-chat"
MAX_LENGTH = 128  # of the harness: longer texts are scored in windows
# Sums of at most 130 log-probabilities, each rounded to float32 and computed with other batches and other kernels.
CLOSE = 1e-4
DOCUMENTS = [
    {"question": "Two and two are", "choices": [" four", " five", " a lot of things"], "label": 0},
    {"question": "Ärger über 東京:", "choices": [" ja", " 日本"], "label": 1},
    {"question": "def main(", "choices": [")", "argv):", "self, *, x=1) -> None:"], "label": 1},
    {"question": "Say <|im_end|> and", "choices": [" go", " stay"], "label": 0},
]
TEXTS = ["A short text.", "A longer one, of several windows. " * 12, "Grüße aus 東京"]


@pytest.fixture(scope="module")
def in_process(chat_model: Path) -> InProcess:
    from tests.server.clients.in_process import InProcess

    return InProcess(chat_model, max_length=MAX_LENGTH - 1)


@pytest.fixture(scope="module")
def environment() -> Any:
    """The report about the machine that the harness adds to results asks several programs and takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("add_env_info", "get_git_commit_hash"):
            patch.setattr(f"lm_eval.evaluator.{name}", lambda *arguments: None)
        yield


def over_http(server: Running, **options: Any) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=MODEL, max_length=MAX_LENGTH, max_retries=1, **options
    )


def requests_of(in_process: InProcess) -> list[Any]:
    """Contexts and continuations as token ids; every other continuation is the greedy one."""
    found = []
    for number, text in enumerate(["one", "def main(", "Grüße", "x" * 140, "the last"]):
        context = in_process.tok_encode(text)[-(MAX_LENGTH - 12) :]
        likely = in_process.greedy(context, 3 + number)
        found += [(("", ""), context, likely), (("", ""), context, [*likely[:-1], (likely[-1] + 1) % 256])]
    return found


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for (score, is_greedy), (own_score, own_greedy) in zip(found, expected, strict=True):
        assert abs(score - own_score) < CLOSE and is_greedy is own_greedy


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 4}, {"batch_size": 3, "num_concurrent": 3}], ids=["single", "batch", "concurrent"]
)
def test_scores_of_token_ids_are_those_in_process(
    server: Running, in_process: InProcess, options: dict[str, Any]
) -> None:
    model = over_http(server, **options)
    assert model.tokenizer_backend == "remote", "found by itself"
    asked = requests_of(in_process)
    expected = in_process._loglikelihood_tokens(asked)
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    assert_close(model._loglikelihood_tokens(asked), expected)


def test_the_remote_tokenizer_is_the_models(server: Running, in_process: InProcess) -> None:
    model = over_http(server)
    for text in ["plain", "Grüße aus 東京 \n\n\t 👍🏽", "def f(x):\n    return x"]:
        ids = model.tok_encode(text)
        assert ids == in_process.tok_encode(text) and model.tokenizer.decode(ids) == text
    assert model.eot_token_id == model.prefix_token_id == in_process.eot_token_id
    assert model.eos_string == in_process.own.decode([in_process.eot_token_id])
    turns = [{"role": "user", "content": "Hi"}]
    rendered = model.tokenizer.apply_chat_template(turns, tools=None)
    served = server.server.served
    assert served.chat_format is not None
    assert model.tok_encode(rendered) == in_process.own.encode(rendered, allow_special=True)
    with server.client() as client:
        asked = client.post("/tokenize", json={"messages": turns}).json()
    assert asked["tokens"] == model.tok_encode(rendered)


def test_texts_are_scored_as_their_tokens(server: Running, in_process: InProcess) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("Two and two are", " four"), ("def main(", "argv):"), ("", "from nothing")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    expected = in_process.loglikelihood(asked)
    assert_close(over_http(server, batch_size=2).loglikelihood(asked), expected)
    # As strings, which the server encodes; without a beginning there is no text for the token before it.
    as_text = over_http(server, tokenized_requests=False)
    assert_close(as_text.loglikelihood(asked[:2]), expected[:2])


def test_a_key_is_sent_to_the_tokenizer_too(
    chat_model: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-of-the-test"
    monkeypatch.setenv("OPENAI_API_KEY", key)  # where it has the key of the model from
    asked = requests_of(in_process)[:2]
    with running_server(chat_model, keys=KeyRing(plain=[key])) as running:
        model = over_http(running, auth_token=key)
        assert model.tokenizer_backend == "remote" and model.eot_token_id == in_process.eot_token_id
        assert_close(model._loglikelihood_tokens(asked), in_process._loglikelihood_tokens(asked))


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer_backend": None},
        {"tokenizer_backend": "remote"},
        {"tokenizer_backend": "remote", "tokenized_requests": False},
    ],
)
def test_answers_to_texts_and_to_tokens_are_the_same(
    server: Running, in_process: InProcess, until: list[str], options: dict[str, Any]
) -> None:
    from lm_eval.api.instance import Instance

    wanted = {"until": until, "max_gen_toks": 12}
    questions = [row["question"] for row in DOCUMENTS if "<|" not in str(row["question"])]
    asked = [Instance("generate_until", {}, (text, wanted), number) for number, text in enumerate(questions)]
    found = over_http(server, batch_size=2, **options).generate_until(asked)
    assert len(found) == 3 and found == in_process.generate_until(asked)


@pytest.fixture(scope="module")
def until(in_process: InProcess) -> list[str]:
    """Stops, one of which the first document's answer meets after a few tokens: a letter that is new in it."""
    answer = in_process.answer(in_process.tok_encode(DOCUMENTS[0]["question"]), until=[], num_tokens=12)
    new = next(letter for place, letter in enumerate(answer) if place and letter not in answer[:place])
    return ["\n\n", new, "never said"]


def tasks(until: list[str]) -> list[Any]:
    """Tasks of each kind on documents in memory."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def rows(**more: Any) -> Any:
        return {"test": Dataset.from_list(DOCUMENTS)}

    def texts(**more: Any) -> Any:
        return {"test": Dataset.from_list([{"text": text} for text in TEXTS])}

    common = {"test_split": "test", "doc_to_text": lambda row: row["question"], "metadata": {"version": 1}}
    configs = [
        {
            **common,
            "task": "choice",
            "custom_dataset": rows,
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["label"],
            "target_delimiter": "",
        },
        {
            **common,
            "task": "write",
            "custom_dataset": rows,
            "output_type": "generate_until",
            "doc_to_target": lambda row: row["choices"][row["label"]],
            "generation_kwargs": {"until": until, "max_gen_toks": 12, "do_sample": False},
            "process_results": lambda row, answers: {"length": len(answers[0])},  # what it is does not matter
            "metric_list": [{"metric": "length", "aggregation": "mean", "higher_is_better": True}],
        },
        {
            **common,
            "task": "rolling",
            "custom_dataset": texts,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": lambda row: row["text"],
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    ]
    return [ConfigurableTask(config=config) for config in configs]


def evaluate(model: Any, **options: Any) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
        **options,
    )


def test_an_evaluation_over_http_is_the_one_in_process(
    server: Running, in_process: InProcess, until: list[str], environment: None
) -> None:
    found = evaluate(
        "local-completions",
        tasks=tasks(until),
        batch_size=4,
        model_args={
            "base_url": f"{server.url}/v1/completions",
            "model": MODEL,
            "max_length": MAX_LENGTH,
            "max_retries": 1,
        },
    )
    expected = evaluate(in_process, tasks=tasks(until))
    assert set(found["results"]) == {"choice", "write", "rolling"}
    for name in found["results"]:
        own = expected["samples"][name]
        for sample, own_sample in zip(found["samples"][name], own, strict=True):
            answers, own_answers = sample["filtered_resps"], own_sample["filtered_resps"]
            if name == "choice":
                assert_close(answers, own_answers)
            elif name == "rolling":
                assert answers == pytest.approx(own_answers, abs=CLOSE * 10)  # a sum of several windows
            else:
                assert answers == own_answers
    first = found["samples"]["write"][0]["filtered_resps"][0]
    assert 0 < len(first) < 12 and until[1] not in first, "it met its stop"
    for name, metric in (("choice", "acc,none"), ("write", "length,none")):
        assert found["results"][name][metric] == expected["results"][name][metric]


def test_chat_completions_of_the_harness(
    server: Running, in_process: InProcess, until: list[str], environment: None
) -> None:
    found = evaluate(
        "local-chat-completions",
        tasks=[tasks(until)[1]],
        apply_chat_template=True,
        model_args={"base_url": f"{server.url}/v1/chat/completions", "model": MODEL, "max_retries": 1},
    )
    samples = found["samples"]["write"]
    assert len(samples) == len(DOCUMENTS)
    for sample in samples:
        turns = [{"role": "user", "content": sample["doc"]["question"]}]
        with server.client() as client:
            ids = client.post("/tokenize", json={"messages": turns}).json()["tokens"]
        assert sample["resps"] == [[in_process.answer(ids, until=until, num_tokens=12)]]
