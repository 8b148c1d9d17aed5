"""An answer is computed again, exactly, from its line in the audit log and its prompt; other models are told apart."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.identity import identity_of
from qnext.server.access.audit import AuditLog
from qnext.server.inference.origin import body_of
from tests.cli.command import Capture, run
from tests.server.serving import Running, running_server

ASKED: dict[str, dict[str, Any]] = {
    "without a seed": {"temperature": 0.8},
    "by the model's defaults": {},
    "greedy": {"temperature": 0},
    "with filters and penalties": {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 0.5},
    "several": {"n": 3},
}


class Traced(NamedTuple):
    running: Running
    log: Path
    folder: Path


@pytest.fixture(scope="module")
def traced(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    log = tmp_path_factory.mktemp("traced") / "audit.jsonl"
    with running_server(chat_model, audit=AuditLog(log)) as running:
        yield Traced(running, log, chat_model)


def ask(running: Running, route: str, body: dict[str, Any]) -> tuple[list[Any], str, str]:
    """The texts of the answers, the request's id and the fingerprint."""
    with running.client() as client:
        reply = client.post(route, json=body)
    assert reply.status_code == 200, reply.text
    values = reply.json()
    assert values["system_fingerprint"] == reply.headers["x-system-fingerprint"]
    texts = [choice.get("text", choice.get("message")) for choice in values["choices"]]
    _wait_for_line(running, reply.headers["x-request-id"])
    return texts, reply.headers["x-request-id"], values["system_fingerprint"]


@pytest.fixture(scope="module")
def other(chat_model: Path) -> Iterator[Running]:
    """Another server on the same folder."""
    with running_server(chat_model) as running:
        yield running


def _wait_for_line(running: Running, request_id: str) -> None:
    """A line is written when the answer is sent; a client may be faster."""
    audit = running.server.audit
    for _ in range(1_000):
        if audit is None or request_id in audit.path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"no line of {request_id}")


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(
    ("route", "prompt"),
    [
        ("/v1/completions", {"prompt": "Once"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once"}]}),
    ],
    ids=["completion", "chat"],
)
def test_an_answer_is_computed_again_from_its_line_and_its_prompt(
    traced: Traced, other: Running, route: str, prompt: dict[str, Any], name: str, capsys: Capture
) -> None:
    first, request_id, fingerprint = ask(traced.running, route, {**prompt, **ASKED[name], "max_tokens": 24})
    document = json.loads(run(capsys, "audit", "trace", traced.log, request_id, "--json").out)
    assert document["record"]["system_fingerprint"] == fingerprint
    again, _, same_fingerprint = ask(other, route, {**prompt, **document["body"]})
    assert (again, same_fingerprint) == (first, fingerprint)
    if name == "without a seed":
        others, _, _ = ask(other, route, {**prompt, **document["body"], "seed": document["body"]["seed"] + 1})
        assert others != first


def test_prompts_of_one_request_have_seeds_of_their_own(traced: Traced, capsys: Capture) -> None:
    texts, request_id, _ = ask(traced.running, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 12})
    trace = json.loads(run(capsys, "audit", "trace", traced.log, request_id, "--json").out)["record"]["trace"]
    assert len(set(trace["seeds"])) == 2
    for prompt, seed, text in zip(("a", "b"), trace["seeds"], texts, strict=True):
        assert ask(traced.running, "/v1/completions", {"prompt": prompt, **body_of(trace), "seed": seed})[0] == [text]


def test_no_content_is_in_the_log(traced: Traced) -> None:
    body = {"prompt": "SECRET-PROMPT", "stop": "SECRET-STOP", "logit_bias": {"77": -1}, "max_tokens": 2}
    _, request_id, _ = ask(traced.running, "/v1/completions", body)
    line = traced.log.read_text().splitlines()[-1]
    assert request_id in line and "SECRET" not in line and '"77"' not in line
    assert json.loads(line)["trace"]["also_given"] == ["logit_bias"]


def test_a_folder_is_the_same_model_or_another(traced: Traced, tmp_path: Path, capsys: Capture) -> None:
    _, request_id, _ = ask(traced.running, "/v1/completions", {"prompt": "a", "max_tokens": 2})
    result = run(capsys, "audit", "trace", traced.log, request_id, "--model", traced.folder)
    assert result.code == 0 and "model: the same" in result.out and '"seed": ' in result.out
    model = load_model(traced.folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_model(model, tmp_path / "other", tokenizer_folder=traced.folder)
    result = run(capsys, "audit", "trace", traced.log, request_id, "--model", tmp_path / "other")
    assert result.code == 5 and "model: recorded" in result.out and "tokenizer: the same" in result.out
    document = json.loads(
        run(capsys, "audit", "trace", traced.log, "last", "--model", tmp_path / "other", "--json").out
    )
    assert document["is_same_model"] is False
    assert "is not in this log" in run(capsys, "audit", "trace", traced.log, "req-none").error_line


def test_a_copy_has_the_same_names_and_a_template_only_changes_its_own(chat_model: Path, tmp_path: Path) -> None:
    before = identity_of(read_layout(chat_model))
    save_model(load_model(chat_model), tmp_path / "copy", tokenizer_folder=chat_model)
    copied = identity_of(read_layout(tmp_path / "copy"))
    assert copied == before
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ messages }}")
    changed = identity_of(read_layout(tmp_path / "copy"))
    assert changed[:2] == before[:2] and changed.template != before.template
