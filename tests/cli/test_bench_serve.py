"""`qnext bench serve`: its prompts and times, what it reports of a real server, and of one that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.cli.parsing.complete import candidates
from qnext.client.load import CHAT, COMPLETIONS
from tests.server.serving import Running, running_server

from .command import Capture, run


@pytest.fixture(scope="module")
def server(chat_folder: Path) -> Iterator[Running]:
    with running_server(chat_folder) as running:
        yield running


def test_a_run_counts_every_token(server: Running, tmp_path: Path, capsys: Capture) -> None:
    saved = tmp_path / "result.json"
    result = run(
        capsys,
        "bench",
        "serve",
        "--url",
        server.url,
        "--random-input-len",
        20,
        "--random-prefix-len",
        6,
        "--random-output-len",
        7,
        "--num-prompts",
        12,
        "--ignore-eos",
        "--warmups",
        2,
        "--goodput",
        "ttft:1e6 tpot:1e6",
        "--metric-percentiles",
        "50,99.9",
        "--json",
        "--save-result",
        saved,
    )
    assert result.code == 0
    document = json.loads(result.out)
    assert document == json.loads(saved.read_text()) and document["model"] == "chat"
    (found,) = document["runs"]
    assert (found["completed"], found["failed"], found["errors"]) == (12, 0, {})
    assert (found["input_tokens"], found["output_tokens"]) == (12 * 26, 12 * 7)
    assert found["goodput"] == found["request_throughput"] == pytest.approx(12 / found["duration_s"])
    assert set(found["ttft_ms"]) == {"mean", "std", "max", "p50", "p99.9"}
    assert 0 < found["ttft_ms"]["p50"] < found["e2el_ms"]["p50"] and found["request_rate"] is None


def test_a_sweep_has_a_table(server: Running, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello", "output_tokens": 3}\n{"conversations": [{"from": "human", "value": "Hi"}]}\n')
    result = run(
        capsys,
        "bench",
        "serve",
        "--base-url",
        f"{server.url}/v1",
        "--endpoint",
        CHAT,
        "--dataset-name",
        "sharegpt",
        "--dataset-path",
        path,
        "--custom-output-len",
        4,
        "--num-prompts",
        6,
        "--sweep-concurrency",
        "1,3",
        "--percentile-metrics",
        "ttft,itl",
    )
    assert result.code == 0
    for part in ("1 in flight", "3 in flight", "answer tokens/s", "ttft, time to first token, ms", "itl, between"):
        assert part in result.out
    assert "tpot" not in result.out


def test_one_run_has_a_table(server: Running, capsys: Capture) -> None:
    arguments = ["--url", server.url, "--random-input-len", 5, "--random-output-len", 2, "--num-prompts", 2]
    # A random model may end an answer before its first token, which counts as a failure.
    result = run(capsys, "bench-serve", *arguments, "--request-rate", "200", "--ignore-eos")
    assert result.code == 0
    for part in ("2 answered, 0 failed", "200 requests/s", "10 of prompts", "tpot, time per output token"):
        assert part in result.out


def test_prompts_that_do_not_fit_are_errors(server: Running, capsys: Capture) -> None:
    result = run(capsys, "bench", "serve", "--url", server.url, "--random-input-len", 999, "--num-prompts", 3)
    assert result.code == 1 and "0 answered, 3 failed" in result.out
    assert "error, 3 times" in result.out and "400: prompt is too long: 999 tokens" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goodput", "itl:3"], "must be ttft, tpot or e2el"),
        (["--goodput", "ttft"], "must be ttft, tpot or e2el"),
        (["--percentile-metrics", "ttft,x"], "must be of ttft,tpot,itl,e2el"),
        (["--metric-percentiles", "101"], "at most 100"),
        (["--endpoint", "/v1/embeddings"], "must be /v1/completions"),
        (["--dataset-name", "custom"], "with --dataset-path"),
        (["--sweep-concurrency", "1,2", "--sweep-rate", "3"], "exclude each other"),
        (["--sweep-concurrency", "1.5"], "whole numbers"),
        (["--sweep-rate", "0"], "positive"),
        (["--request-rate", "0"], "positive"),
        (["--random-output-len", "0"], "at least one token"),
        (["--url", "http://127.0.0.1:9"], "ConnectError"),
    ],
)
def test_a_users_fault_is_one_line(capsys: Capture, arguments: list[str], message: str) -> None:
    result = run(capsys, "bench", "serve", *arguments)
    assert result.code == 2 and message in result.error_line


def test_both_words_of_the_verb_complete() -> None:
    assert [line.partition("\t")[0] for line in candidates(["bench", "serve", "--goodp"])] == ["--goodput"]
    assert [line.partition("\t")[0] for line in candidates(["bench", "--goodp"])] == []
    assert [line.partition("\t")[0] for line in candidates(["bench", "serve", "--endpoint", ""])] == [COMPLETIONS, CHAT]
    assert candidates(["bench", "serve", "--url", ""]) == []
