"""The contest: figures of a run against a false llama-bench, its files, its bounds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext import ops
from qnext.bench.device import published_limits
from qnext.bench.files import BenchFiles, cached_share, gguf_type, stored_scheme
from qnext.bench.llama import LlamaBench, find_tools
from qnext.bench.plan import BenchPlan
from qnext.bench.predicted import predicted_rates
from qnext.bench.run import _add_bounds, run_bench
from qnext.bench.table import format_table
from qnext.bench.workers import _bytes_by_part, _read_bytes, qnext_worker, transformers_worker
from qnext.checkpoint import load_model
from qnext.errors import DoesNotFit, UsageError
from qnext.ops.quantized import pack_codes
from qnext.planning import count_active, count_parameters, forward_flops_per_token
from tests.bench.false_llama import calls_of, make_false_bench
from tests.bench.limits import LIMITS
from tests.cli.command import make_model
from tests.config.folder import read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def document(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[str]]]:
    """One run against the false llama-bench, and how that was called."""
    made = tmp_path_factory.mktemp("tools")
    make_false_bench(made)
    gguf = made / "model.gguf"
    gguf.write_bytes(b"GGUF")
    plan = BenchPlan(
        files=BenchFiles(folder, made / "cache"),
        config=read_config(folder),
        schemes=["bf16"],
        peers=["llama.cpp"],
        threads=1,
        prefill=48,
        depths=[0, 64],
        decode_tokens=4,
        rounds=2,
        long_prefill=96,
        llama=find_tools(made),
        ggufs={"bf16": gguf},
        date="some day",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qnext.bench.run._limits", lambda threads: LIMITS)
        found = run_bench(plan, say=lambda text: None)
    return found, calls_of(made)


def test_every_figure_is_there(document: tuple[dict[str, Any], list[list[str]]]) -> None:
    found, _ = document
    (scheme,) = found["schemes"]
    assert [(f["kind"], f.get("tokens", f.get("depth"))) for f in scheme["figures"]] == [
        ("prefill", 48),
        ("decode", 0),
        ("decode", 64),
        ("generate", 0),
        ("prefill", 96),
    ]
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


@pytest.mark.parametrize("name", ["NVIDIA H200", "another GPU"])
def test_on_a_gpu_shares_are_of_its_published_limits(
    folder: Path, document: tuple[dict[str, Any], list[list[str]]], name: str
) -> None:
    """The figures of the CPU, as if a GPU had had them."""
    limits = published_limits(name)
    found = copy.deepcopy(document[0])
    found |= {"limits": limits, "machine": {**found["machine"], "device": "cuda:0", "device_name": name}}
    (scheme,) = found["schemes"]
    scheme |= {"kernels": "triton", "peers": [], "memory": {**scheme["memory"], "host_peak_bytes": 1 << 30}}
    scheme["facts"] = dict.fromkeys(
        ("prefill_weight_bytes", "decode_weight_bytes", "kv_bytes_per_token", "state_bytes"), 1 << 20
    )
    plan = BenchPlan(BenchFiles(folder, folder), read_config(folder), ["bf16"], [], 1, 48, [0], 4, 2, device="cuda:0")
    _add_bounds(scheme, plan, limits)
    decode, is_known = scheme["figures"][1], name == "NVIDIA H200"
    rate, bound = decode["tokens_per_second"]["median"], decode["bound"]
    shares = bound["share_of_bandwidth"], bound["share_of_peak"]
    of_limits = rate * bound["bytes_per_token"] / 4.8e12, rate * bound["operations_per_token"] / 989.4e12
    assert shares == (pytest.approx(of_limits) if is_known else (None, None)) and bound["arithmetic"] == "bfloat16"
    head, known, *_ = format_table(found).splitlines()
    assert head.endswith(f" on {name} (cuda:0), kernels: triton, some day")
    assert ("4,800 GB/s" in known) == is_known and ("not known here" in known) != is_known
    assert "; on the host 1.00 GiB" in format_table(found)
    assert predicted_rates(plan) == {}


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
    projection.set_weight("weight", ops.QuantizedWeight(pack_codes(codes, bits=8), scales, 8, 16))
    after = _bytes_by_part(model)
    assert before["delta_net"] - after["delta_net"] == weight.nbytes - weight.nbytes * 9 // 16
    del before["delta_net"], after["delta_net"]
    assert before == after


def test_files(folder: Path, tmp_path: Path) -> None:
    assert stored_scheme(folder) == "bf16"
    files = BenchFiles(folder, tmp_path)
    assert files.folder_of("bf16") == files.folder_of("f32") == folder
    assert [gguf_type(scheme) for scheme in ("bf16", "int8", "int4-g32", "int4-g128", "stored")] == [
        "BF16",
        "Q8_0",
        "Q4_K_M",
        "Q4_K_M",
        None,
    ]
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
    [
        ("echo '[]'", "exit code 0"),
        ("echo 'unknown model architecture' >&2; exit 1", "unknown model architecture"),
        ("echo '[{\"avg_ts\": 1}]'", "could not measure"),
    ],
)
def test_a_failing_llama_bench_is_one_line(tmp_path: Path, script: str, message: str) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    contestant = LlamaBench(str(program), tmp_path / "m.gguf", threads=1, decode_tokens=2)
    with pytest.raises(UsageError, match=message) as caught:
        contestant.step("prefill", 4)
    assert "\n" not in str(caught.value)


def test_llama_bench_gets_its_own_options_in_every_run(tmp_path: Path) -> None:
    program, options = make_false_bench(tmp_path), ["-lm", "mmap"]
    contestant = LlamaBench(str(program), tmp_path / "m.gguf", threads=1, decode_tokens=2, options=options)
    assert contestant.step("prefill", 4) == 4 / 50
    assert contestant.step("decode", 8) == 2 / 10
    with_options = [call for call in calls_of(tmp_path) if options == call[call.index("-lm") :][:2]]
    assert len(with_options) == 2


@pytest.mark.parametrize("worker", [qnext_worker, transformers_worker])
def test_what_memory_cannot_hold_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch, worker: Any) -> None:
    monkeypatch.setattr("qnext.planning.machine.available_bytes", lambda: 1000)
    threads = torch.get_num_threads()
    with pytest.raises(DoesNotFit, match="1000 B of memory are free"):
        worker(folder=str(folder), dtype=None, threads=threads, decode_tokens=2)


@pytest.mark.slow
def test_what_transformers_cannot_run_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(UsageError, match="peer transformers cannot run this model") as caught:
        transformers_worker(folder=str(tmp_path), dtype="bfloat16", threads=1, decode_tokens=2)
    assert "\n" not in str(caught.value)
