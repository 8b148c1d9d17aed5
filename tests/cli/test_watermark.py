"""`qnext watermark`: a key for its owner alone, and answers of `generate` and of a server that show it."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import pytest

from qnext import LLM, SamplingParams
from qnext.engine.sampling.watermark import score
from qnext.server.access.audit import AuditLog
from qnext.server.inference.served import Marking
from qnext.session.watermark import read_key
from tests.cli.command import Capture, run
from tests.server.serving import running_server, save_served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("marked") / "model")


@pytest.fixture
def key(tmp_path: Path, capsys: Capture) -> Path:
    result = run(capsys, "watermark", "create", tmp_path / "key.json")
    assert (result.code, result.out) == (0, f"{tmp_path / 'key.json'}\n")
    return tmp_path / "key.json"


def test_a_key_is_for_its_owner_alone(key: Path, tmp_path: Path, capsys: Capture) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert json.loads(key.read_text())["secret"] not in run(capsys, "watermark", "create", tmp_path / "other").err
    assert "exists already" in run(capsys, "watermark", "create", key).error_line
    assert (
        "--delta is nothing of a tournament"
        in run(capsys, "watermark", "create", tmp_path / "n", "--delta", 1).error_line
    )
    green = run(capsys, "watermark", "create", tmp_path / "green", "--scheme", "green", "--delta", 3)
    assert green.code == 0 and read_key(tmp_path / "green").delta == 3


def test_a_text_shows_its_key_and_no_other(key: Path, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    marked, plain = tmp_path / "marked", tmp_path / "plain"
    with LLM(folder, max_num_seqs=1) as llm:
        letters = tuple(llm.tokenize(ascii_lowercase))  # one token per byte
        params = SamplingParams(max_tokens=300, temperature=1.0, seed=1, allowed_token_ids=letters, ignore_eos=True)
        plain.write_text(llm.generate("Once", params).text)
        marked.write_text(llm.generate("Once", replace(params, watermark=read_key(key))).text)
    found = run(capsys, "watermark", "detect", "--key", key, "--model", folder, marked)
    assert found.code == 0 and "marked by this key" in found.out
    found = run(capsys, "watermark", "detect", "--key", key, "--model", folder, plain)
    assert "no sign of this key" in found.out
    run(capsys, "watermark", "create", tmp_path / "other")
    values = json.loads(
        run(capsys, "watermark", "detect", "--key", tmp_path / "other", "--model", folder, marked, "--json").out
    )
    assert values["is_marked"] is False and values["p_value"] > 1e-4
    plain.write_text("short")
    assert "too short to say" in run(capsys, "watermark", "detect", "--key", key, "--model", folder, plain).out


@pytest.mark.parametrize("is_optional", [False, True])
def test_a_server_marks_all_answers_or_those_that_ask_for_it(
    is_optional: bool, key: Path, folder: Path, tmp_path: Path
) -> None:
    log = AuditLog(tmp_path / "audit")
    with running_server(folder, audit=log) as running, running.client() as client:
        asked = {"prompt": "Once", "max_tokens": 40, "seed": 3, "temperature": 1.0}

        def text(**more: object) -> str:
            reply = client.post("/v1/completions", json={**asked, **more})
            return reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.json()["error"]["message"]

        plain = text()
        assert text(watermark=True) == "this server marks no answers" and text(watermark=False) == plain
        running.server.served.marking = Marking(read_key(key), is_optional)
        marked = text(watermark=True)
        assert marked != plain
        assert text() == (plain if is_optional else marked)
        assert text(watermark=False) == (plain if is_optional else "this server marks all answers")
    traces = [json.loads(line)["trace"] for line in (tmp_path / "audit").read_text().splitlines()]
    assert read_key(key).name in [trace["watermark"] for trace in traces if trace]
    assert json.loads(key.read_text())["secret"] not in (tmp_path / "audit").read_text()


def test_generate_marks_by_the_key(key: Path, folder: Path, capsys: Capture) -> None:
    words = [
        "generate",
        folder,
        "Once",
        "--max-tokens",
        200,
        "--temperature",
        1.2,
        "--seed",
        1,
        "--ignore-eos",
        "--json",
    ]
    marked = json.loads(run(capsys, *words, "--watermark", key).out)
    plain = json.loads(run(capsys, *words).out)
    assert marked["watermark"] == read_key(key).name and "watermark" not in plain
    assert score(marked["token_ids"], read_key(key)).p_value < 1e-6 < score(plain["token_ids"], read_key(key)).p_value


def test_what_is_no_key_is_told_in_one_line(key: Path, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text").write_text("a text of some length")
    (tmp_path / "bad").write_text('{"qnext_watermark": 1, "secret": "00"}')
    result = run(capsys, "watermark", "detect", "--key", tmp_path / "bad", "--model", folder, tmp_path / "text")
    assert result.code == 2 and "the secret must have 32 bytes" in result.error_line
    key.chmod(0o644)
    result = run(capsys, "watermark", "detect", "--key", key, "--model", folder, tmp_path / "text")
    assert result.code == 0 and "others may read it" in result.err
    assert "--watermark-optional needs" in run(capsys, "serve", folder, "--watermark-optional").error_line
