"""`qnext bench`: what it refuses, what it reports, and the arithmetic between."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext import ops
from qnext.checkpoint import load_model
from qnext.cli._bench_files import BenchFiles, cached_share, gguf_type, stored_scheme
from qnext.cli._bench_llama import LlamaBench, find_tools
from qnext.cli._bench_table import format_table
from qnext.cli._bench_workers import _bytes_by_part, _read_bytes, qnext_worker, transformers_worker
from qnext.config import read_config
from qnext.errors import DoesNotFit, UsageError
from qnext.ops.quantized import pack_codes
from qnext.planning import count_active, count_parameters, forward_flops_per_token

from .command import Capture, make_model, run

# Answers like llama-bench: 50 tokens per second for prompts, 20 at depth 0, half of it deeper. Notes its arguments.
FAKE_BENCH = """#!{python}
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(pathlib.Path(__file__).with_name("calls"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
rate = 50.0 if options["-n"] == "0" else 20.0 if options.get("-d", "0") == "0" else 10.0
print(json.dumps([{{"model_type": "qwen3next Q8_0", "model_size": 123, "build_commit": "abc", "avg_ts": rate}}]))
"""
CASES = {
    "peer": (["--peer", "vllm"], "--peer vllm: must be llama.cpp or transformers"),
    "scheme": (["--scheme", "int3"], "--scheme int3: must be one of f32, f16, bf16, int4-g32"),
    "deep": (["--depths", "0,120"], "--depths: 120 and 32 decoded tokens are beyond the context of 128"),
    "negative depth": (["--depths=-1"], "--depths: -1 and"),
    "no number": (["--depths", "0,2k"], "--depths '0,2k': must be numbers"),
    "rounds": (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    "threads": (["--threads", "-3", "--prefill", "64"], "--threads must be at least 1, not -3"),
    "prompt": (["--prefill", "128"], "--prefill 128: a prompt has 1 to 127 tokens"),
    "long prompt": (["--prefill", "64", "--long-prefill", "999"], "--long-prefill 999"),
    "no llama.cpp": (
        ["--prefill", "64", "--peer", "llama.cpp", "--llama-cpp", "nowhere"],
        "peer llama.cpp: no llama-bench in nowhere; build https://",
    ),
    "file": (["--prefill", "64", "--gguf", "none.gguf"], "--gguf none.gguf: no such file"),
    "file for what": (
        ["--prefill", "64", "--scheme", "bf16", "--scheme", "int8", "--gguf", "x.gguf"], "say for which",
    ),
    "file for nothing": (["--prefill", "64", "--gguf", "int8=x.gguf"], "int8 is not among the schemes bf16"),
    "nothing to compare": (
        ["--prefill", "64", "--scheme", "int8", "--peer", "transformers"], "nothing to compare in int8",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", CASES)
def test_refusals_come_before_any_work(folder: Path, capsys: Capture, name: str) -> None:
    options, message = CASES[name]
    result = run(capsys, "bench", folder, *options)
    assert result.code == 2
    assert message in result.error_line


def test_no_such_model(capsys: Capture) -> None:
    assert run(capsys, "bench", "nowhere").code == 3


def test_a_missing_transformers_is_said(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run(capsys, "bench", folder, "--prefill", "64", "--peer", "transformers")
    assert (result.code, result.error_line) == (
        2, "qnext bench: peer transformers: not installed; pip install transformers",
    )  # fmt: skip


@pytest.fixture(scope="module")
def document(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    """One run against the false llama-bench, and how that was called."""
    from qnext.cli._bench import BenchPlan, run_bench

    made = tmp_path_factory.mktemp("tools")
    program = made / "llama-bench"
    program.write_text(FAKE_BENCH.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    gguf = made / "model.gguf"
    gguf.write_bytes(b"GGUF")
    plan = BenchPlan(
        files=BenchFiles(folder, made / "cache"), config=read_config(folder), schemes=["bf16"], peers=["llama.cpp"],
        threads=1, prefill=48, depths=[0, 64], decode_tokens=4, rounds=2, long_prefill=96, llama=find_tools(made),
        ggufs={"bf16": gguf}, date="some day",
    )  # fmt: skip
    limits = {
        "read_bytes_per_second": 1e9, "operations_per_second": {"float32": 1e9, "bfloat16": None, "int8": 1e9},
        "native_kernels": None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # measuring them takes seconds, and test_limits does
        patch.setattr("qnext.cli._bench._limits", lambda threads: limits)
        found = run_bench(plan, say=lambda text: None)
    calls = [json.loads(line) for line in (made / "calls").read_text().splitlines()]
    return found, calls


def test_every_figure_is_there(document: tuple[dict[str, Any], list[list[str]]]) -> None:
    found, _ = document
    (scheme,) = found["schemes"]
    assert [(f["kind"], f.get("tokens", f.get("depth"))) for f in scheme["figures"]] == [
        ("prefill", 48), ("decode", 0), ("decode", 64), ("generate", 0), ("prefill", 96),
    ]  # fmt: skip
    for figure in scheme["figures"]:
        rate = figure["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert [(row["kind"], row["over"]) for row in scheme["within"]] == [("decode", 0), ("prefill", 48)]
    assert scheme["load"]["seconds"]["min"] < scheme["load"]["process_seconds"]["min"]
    memory = scheme["memory"]
    assert memory["peak_bytes"] >= memory["peak_bytes_loaded"] > memory["weight_bytes"]
    assert found["machine"]["threads"] == 1 and found["machine"]["date"] == "some day" and found["machine"]["cpu"]
    assert json.loads(json.dumps(found)) == found


def test_ratios_are_rates_over_rates(document: tuple[dict[str, Any], list[list[str]]]) -> None:
    """The false peer always runs at the same speed, so that qnext's own spread is the ratio's."""
    (peer,) = document[0]["schemes"][0]["peers"]
    assert (peer["peer"], peer["type"], peer["build"]) == ("llama.cpp", "qwen3next Q8_0", "abc")
    for figure, rate in zip(peer["figures"], (50.0, 20.0, 10.0), strict=True):
        assert figure["peer_tokens_per_second"] == pytest.approx({"median": rate, "min": rate, "max": rate})
        assert figure["ratio"] == pytest.approx({k: v / rate for k, v in figure["tokens_per_second"].items()})


def test_peers_take_turns_with_the_same_sizes(document: tuple[dict[str, Any], list[list[str]]]) -> None:
    _, calls = document
    options = [dict(zip(call[::2], call[1::2], strict=False)) for call in calls]
    assert all((o["-t"], o["-r"], o["-o"]) == ("1", "1", "json") for o in options)
    sizes = [(o["-p"], o["-n"], o.get("-d")) for o in options]
    turn = [("48", "0", None), ("0", "4", "0"), ("0", "4", "64")]
    assert sizes == [("0", "1", None)] * 2 + turn * 2


def test_bounds_follow_from_the_configuration(folder: Path, document: tuple[dict[str, Any], list[list[str]]]) -> None:
    found, _ = document
    config = read_config(folder)
    bounds = {(f["kind"], f.get("tokens", f.get("depth"))): f["bound"] for f in found["schemes"][0]["figures"]}
    shallow, deep = bounds["decode", 0], bounds["decode", 64]
    weights = 2 * count_active(config).with_head
    assert weights < shallow["bytes_per_token"] < deep["bytes_per_token"]
    assert deep["operations_per_token"] == forward_flops_per_token(config, context=66)
    counts = count_parameters(config)
    read = counts.trunk - counts.embedding - counts.head + config.vocab_size * config.hidden_size
    assert bounds["prefill", 48]["bytes_per_token"] == pytest.approx(2 * read / 48)
    limit = found["limits"]["read_bytes_per_second"]
    rate = next(f for f in found["schemes"][0]["figures"] if f["kind"] == "decode")["tokens_per_second"]["median"]
    assert shallow["share_of_bandwidth"] == pytest.approx(rate * shallow["bytes_per_token"] / limit)


def test_table(document: tuple[dict[str, Any], list[list[str]]]) -> None:
    found, _ = document
    text = format_table(found)
    assert "against llama.cpp qwen3next Q8_0" in text and "decode at 64 over 0" in text and "some day" in text
    assert max(map(len, text.splitlines()[1:])) <= 130, "all but the line that names the folder"


def test_bytes_of_quantised_weights_count(folder: Path) -> None:
    """A matrix in eight bits with scales in bf16 for every 16 inputs: half its bytes and an eighth more."""
    model = load_model(folder)
    config = model.config
    before = _bytes_by_part(model)
    assert sum(before.values()) == 2 * count_parameters(config).total
    assert _read_bytes(model, before, all_experts=False) == 2 * count_active(config).with_head
    projection = model.model.layers[0].linear_attn.out_proj
    weight = projection.weight
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    scales = torch.zeros(*weight.shape[:-1], weight.shape[-1] // 16, dtype=torch.bfloat16)
    del projection.weight
    projection.weight = ops.QuantizedWeight(pack_codes(codes, bits=8), scales, 8, 16)  # type: ignore[assignment]
    after = _bytes_by_part(model)
    assert before["delta_net"] - after["delta_net"] == weight.nbytes - weight.nbytes * 9 // 16
    del before["delta_net"], after["delta_net"]
    assert before == after


def test_files(folder: Path, tmp_path: Path) -> None:
    assert stored_scheme(folder) == "bf16"
    files = BenchFiles(folder, tmp_path)
    assert files.folder_of("bf16") == files.folder_of("f32") == folder
    assert [gguf_type(scheme) for scheme in ("bf16", "int8", "int4-g32", "int4-g128", "stored")] == [
        "BF16", "Q8_0", "Q4_K_M", "Q4_K_M", None,
    ]  # fmt: skip
    share = cached_share([next(folder.glob("*.safetensors"))])  # just written
    assert share is None or 0 <= share <= 1


def test_changed_weights_get_new_files(tmp_path: Path) -> None:
    """What was made from other weights is never used again."""
    folder = make_model(tmp_path)
    before = BenchFiles(folder, tmp_path)._folder
    assert BenchFiles(folder, tmp_path)._folder == before
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    assert BenchFiles(folder, tmp_path)._folder != before


@pytest.mark.parametrize(
    ("script", "message"),
    [("echo '[]'", "exit code 0"), ("echo 'unknown model architecture' >&2; exit 1", "unknown model architecture"),
     ("echo '[{\"avg_ts\": 1}]'", "could not measure")],
)  # fmt: skip
def test_a_failing_llama_bench_is_one_line(tmp_path: Path, script: str, message: str) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    contestant = LlamaBench(str(program), tmp_path / "m.gguf", threads=1, decode_tokens=2)
    with pytest.raises(UsageError, match=message) as caught:
        contestant.step("prefill", 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("worker", [qnext_worker, transformers_worker])
def test_what_memory_cannot_hold_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch, worker: Any) -> None:
    monkeypatch.setattr("qnext.engine.memory.available_bytes", lambda device: 1000)
    threads = torch.get_num_threads()
    with pytest.raises(DoesNotFit, match="1000 B of memory are free"):
        worker(folder=str(folder), dtype=None, threads=threads, decode_tokens=2)


@pytest.mark.slow
def test_against_transformers(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "model"  # transformers multiplies experts only where rows are multiples of 16 bytes
    assert run(capsys, "init", "nano-5m", folder).code == 0
    options = ["--prefill", 32, "--depths", "0,16", "--decode", 4, "--rounds", 1, "--threads", 1]
    result = run(
        capsys, "bench", folder, "--peer", "transformers", *options, "--cache", tmp_path, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    (peer,) = json.loads(result.out)["schemes"][0]["peers"]
    assert len(peer["figures"]) == 3 and all(figure["ratio"]["median"] > 0 for figure in peer["figures"])
    assert peer["load"]["seconds"]["median"] > 0 and peer["peak_bytes"] > 0


@pytest.mark.slow
def test_what_transformers_cannot_run_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(UsageError, match="peer transformers cannot run this model") as caught:
        transformers_worker(folder=str(tmp_path), dtype="bfloat16", threads=1, decode_tokens=2)
    assert "\n" not in str(caught.value)
