"""`qnext eval quant`, `speed` and `bias`: tables and documents of real folders, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import running_server, save_served

from .command import Capture, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Path:
    from qnext.checkpoint.quantize import quantize_folder
    from qnext.quant.scheme import make_policy

    out = folder.with_name("int8")
    quantize_folder(folder, out, policy=make_policy("int8", head=None, is_tied=False))
    return out


def test_what_quantising_cost(folder: Path, quantized: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.txt").write_text("def main(): pass\n" * 8)
    (tmp_path / "b.txt").write_text("Grüße\n" * 9)
    asked = ("--text", tmp_path, "--tasks", "copy", "--lengths", 300, "--samples", 1)
    told = run(capsys, "eval", "quant", folder, quantized, *asked, "--json")
    assert told.code == 0, told.err
    first, second = json.loads(told.out)
    assert first["text"] is None and second["num_bytes"] < first["num_bytes"]
    assert 0 < second["text"]["kl_mean"] < 0.1 and second["text"]["greedy_agreement"] > 0.5
    assert second["tasks"]["totals"]["copy"]["value"] == 0.0
    lines = run(capsys, "eval", "quant", folder, quantized, *asked).out.splitlines()
    assert lines[0].split()[:4] == ["model", "MB", "bits/byte", "change"] and lines[2].startswith(str(quantized))
    alone = json.loads(run(capsys, "eval", folder, tmp_path, "--json").out)
    assert alone["bits_per_byte"] == pytest.approx(first["perplexity"]["total"]["bits_per_byte"])


def test_the_first_request_and_those_after_it(folder: Path, capsys: Capture) -> None:
    asked = ("--contexts", "40,100", "--output-len", 5, "--minutes", 0)
    told = run(capsys, "eval", "speed", folder, *asked, "--json")
    assert told.code == 0, told.err
    rows = json.loads(told.out)["rows"]
    assert [row["context"] for row in rows] == [40, 100]
    for row in rows:
        assert row["load_seconds"] > 0 and row["cold"]["completed"] == row["sustained"]["completed"] == 1
        assert row["cold"]["input_tokens"] == row["context"] and row["sustained"]["output_tokens"] == 5
        assert 0 < row["cold"]["ttft_ms"]["p50"] < row["cold"]["e2el_ms"]["p50"] and row["drift"] is None
    assert run(capsys, "eval", "speed", folder, *asked).out.count("\n") == 3


def test_the_probe_over_http_is_that_in_process(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines: list[dict[str, Any]] = [
        {"axis": "own", "first": f"The {a} cat", "second": f"The {b} cat", "ending": ending}
        for a, b in (("old", "new"), ("red", "blue"))
        for ending in ("sleeps", "runs")
    ]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    here = json.loads(run(capsys, "eval", "bias", folder, "--pairs", pairs, "--json").out)
    with running_server(folder) as server:
        there = json.loads(run(capsys, "eval", "bias", "--url", server.url, "--pairs", pairs, "--json").out)
    assert len(here["endings"]) == 2 and here["limits"]
    for one, other in zip(here["endings"], there["endings"], strict=True):
        assert one["difference"] == pytest.approx(other["difference"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["quant", "MODEL", "--text", "X"], "give a reference and at least one model"),
        (["quant", "MODEL", "MODEL", "--text", "none"], "none: No such file"),
        (["speed", "MODEL", "--contexts", "9k"], "--contexts 9000: prompt and answer are beyond 2048 tokens"),
        (["speed", "MODEL", "--url", "http://localhost"], "`qnext bench serve`"),
        (["bias", "MODEL", "--axes", "wealth"], "no axis 'wealth'"),
        (["bias"], "give either MODEL or --url"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, folder: Path, capsys: Capture) -> None:
    told = run(capsys, "eval", *(folder if word == "MODEL" else word for word in words))
    assert told.code == 2 and line in told.err and "Traceback" not in told.err
