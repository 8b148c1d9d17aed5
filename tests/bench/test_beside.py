"""Experts from disk beside a false llama-bench: the whole benchmark, whose sides take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.false_llama import calls_of, make_false_bench
from tests.cli.command import make_model
from tests.house.source import ROOT


def run_beside(folder: Path, tools: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "bench_streaming.py")
    options = ["--peer", "llama.cpp", "--llama-cpp", str(tools), "--expert-memory", "1M", "--threads", "1"]
    command = [sys.executable, script, str(folder), *options, *more]
    return subprocess.run(command, cwd=tools, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("beside")
    model, out = make_model(parent), parent / "records"
    subprocess.run([sys.executable, "-m", "qnext", "convert", str(model), str(out), "--records"], check=True)
    return out


@pytest.mark.slow
def test_both_sides_of_every_figure_are_in_the_document(records: Path, tmp_path: Path) -> None:
    make_false_bench(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    done = run_beside(records, tmp_path, "--gguf", str(gguf), "--tokens", "4", "--prefill", "24", "48", "--rounds", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = ["prefill 24", "prefill 48", "decode after 24"]
    assert [figure["figure"] for figure in found["figures"]] == names
    assert [row["round"] for row in found["rows"]] == [1, 1, 1, 2, 2, 2]
    for number, (figure, theirs) in enumerate(zip(found["figures"], (50, 50, 10), strict=True)):
        assert figure["llama.cpp"]["median"] == pytest.approx(theirs)
        ours = [row["tokens_per_second"] for row in found["rows"][number::3]]
        assert figure["ratio"]["min"] == pytest.approx(min(ours) / theirs)
        assert figure["ratio"]["max"] == pytest.approx(max(ours) / theirs)
    assert len(found["cached_share_before_each"]) == 12
    calls = calls_of(tmp_path)
    assert len(calls) == 6
    assert all(call[call.index("-lm") + 1] == "mmap" for call in calls)
    assert all(call[call.index("-n") + 1] == ("4" if "-d" in call else "0") for call in calls)


@pytest.mark.slow
def test_more_memory_than_there_is_ends_with_one_line(records: Path, tmp_path: Path) -> None:
    make_false_bench(tmp_path)
    done = run_beside(records, tmp_path, "--gguf", str(tmp_path / "llama-bench"), "--memory", "900T")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert "--memory wants" in line
