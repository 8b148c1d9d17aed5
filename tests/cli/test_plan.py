"""`qnext plan`: what fits, and how fast it will be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext import ops
from qnext.bench import calibrate
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.streamed import plan_residency
from qnext.ops import limits
from qnext.ops.expert_rates import KernelRates
from qnext.planning import machine
from qnext.planning.expert_memory import engine_reserve
from qnext.planning.expert_speed import TRAFFIC
from qnext.planning.measured import MeasuredFigure, measured_file, note_measured
from qnext.session import planned
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.checkpoint.record_folders import RECORD_CONFIG, RecordForm, record_folder

from .command import Capture, make_model, run

needs_kernels = pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not change from run to run."""
    monkeypatch.setattr(planned, "kernel_rates", lambda config, is_quantized: KernelRates(30e9, 2e12))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Without a calibration, whatever was measured here before."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The codes of a model of four experts a layer, in records."""
    record_folder(tmp_path / "m", RecordForm("float16", 4, 32))
    return tmp_path / "m"


def documents(capsys: Capture, *arguments: object) -> list[dict[str, Any]]:
    result = run(capsys, "plan", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)  # type: ignore[no-any-return]


def half_of_the_experts(folder: Path) -> int:
    """Free memory with which about half of the experts stay."""
    layout = read_layout(folder)
    sizes = planned.planned_folder("m", layout).sizes.experts
    return engine_reserve(layout.config, num_threads=torch.get_num_threads()) + sizes.other_bytes + sizes.all_bytes // 2


def test_a_preset_in_a_scheme(capsys: Capture, rates: None) -> None:
    (found,) = documents(capsys, "80b-a3b", "--memory", "22G")
    assert found["assumed"] == ["--scheme int4-g32", "--disk-speed 1.5g"]
    assert found["weight_bytes"] == pytest.approx(46.4e9, rel=0.002)
    assert (found["placement"], found["context"], found["batch"]) == ("streamed", 4096, 1)
    assert 0.35 < found["share"] < 0.4 and found["used_bytes"] <= found["free_bytes"] == 22 << 30
    traffic = found["traffic"]
    assert traffic["uniform"]["decode"] < traffic["diverse"]["decode"] < traffic["service"]["decode"]
    assert [more["bytes"] >> 30 for more in found["more_memory"]] == [8, 16]
    curve = found["hit_curve"]
    assert curve["uniform"]["0.3"] == pytest.approx(0.3) and curve["uniform"]["0.3"] < curve["diverse"]["0.3"] < 0.9
    given = documents(capsys, "80b-a3b", "--memory", "22G", "--scheme", "int8", "--disk-speed", "3g")[0]
    assert given["assumed"] == [] and given["machine"]["disk"] == 3e9
    assert given["weight_bytes"] == pytest.approx(86.8e9, rel=0.002)
    fixed = documents(capsys, "80b-a3b", "--memory", "22G", "--expert-memory", "4G")[0]
    assert fixed["expert_bytes"] == pytest.approx(4 << 30, rel=0.001) and fixed["more_memory"] == []


def test_a_table_for_people(capsys: Capture, rates: None) -> None:
    result = run(capsys, "plan", "80b-a3b", "--memory", "22G", "--context", "262144")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "80b-a3b: weights 43.3 GiB, memory free 22.0 GiB"
    assert "of them stay in memory" in lines[2] and "1 x 262,144 tokens" in lines[3]
    assert "at 30.0 GB/s, on prompts 2.00 Top/s; disk 1.50 GB/s" in lines[4] and "not calibrated" in lines[5]
    assert "`--expert-memory" in lines[6]
    assert [line.split()[0] for line in lines if line.endswith(tuple("0123456789"))][:3] == [
        "uniform",
        "diverse",
        "service",
    ]
    assert any("+ 16.0 GiB" in line for line in lines)
    assert any(line.startswith("    service   10%: 74%") for line in lines), "a hit curve"
    resident = run(capsys, "plan", "nano-5m", "--memory", "22G").out
    assert "all weights stay in memory" in resident and "more memory" not in resident and "traffic" not in resident


@needs_kernels
def test_a_folder_is_planned_as_it_would_be_loaded(
    capsys: Capture, folder: Path, rates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = half_of_the_experts(folder)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "available_bytes", lambda: free)
        (found,) = documents(capsys, folder)
        chosen = plan_residency(folder)
    assert chosen is not None and found["placement"] == "streamed" and found["assumed"] == []
    assert found["share"] == pytest.approx(sum(chosen.slots) / (len(chosen.slots) * RECORD_CONFIG.num_experts))
    assert found["machine"]["disk"] > 1e6, "was measured"
    assert documents(capsys, folder, "--disk-speed", "2g")[0]["placement"] == "resident"


def test_nothing_fits(capsys: Capture, tmp_path: Path, rates: None) -> None:
    result = run(capsys, "plan", "80b-a3b", "--memory", "4G")
    assert result.code == 4 and "does not fit" in result.out
    assert result.err.startswith(
        "qnext plan: 80b-a3b: experts on disk need 162.0 MiB of memory at least beside 2.8 GiB"
    )
    several = run(capsys, "plan", "80b-a3b", "nano-5m", "--memory", "4G", "--json")
    assert several.code == 0
    assert [each["placement"] for each in json.loads(several.out)] == ["too large", "resident"]
    plain = run(capsys, "plan", make_model(tmp_path), "--memory", "1M")
    assert plain.code == 4 and "weights of" in plain.err and "`--scheme int4-g32`" in plain.err


def test_another_machine(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine is measured."""
    monkeypatch.setattr(planned, "kernel_rates", lambda *given, **named: pytest.fail("measured"))
    found, small = documents(capsys, "80b-a3b", "nano-5m", "--machine", "24GiB,30GB/s,1.5GB/s,2Top/s")
    assert (found["placement"], found["free_bytes"], small["placement"]) == ("streamed", 22 << 30, "resident")
    assert found["machine"] == {"memory": 15e9, "disk": 1.5e9, "arithmetic": pytest.approx(0.6e12)}
    assert found["assumed"][0] == "--scheme int4-g32" and "are reached" in found["assumed"][1]
    assert [more["bytes"] >> 30 for more in found["more_memory"]] == [8, 16]
    for speed in found["traffic"].values():
        seconds = speed["arithmetic_seconds"] + speed["read_seconds"] - speed["overlapped_seconds"]
        assert speed["decode"] == pytest.approx(1 / seconds) and speed["overlapped_seconds"] >= 0
    for length, rate in found["prefill"].items():
        seconds = found["prefill_time"][length]
        assert rate == pytest.approx(
            1 / (seconds["arithmetic_seconds"] + seconds["read_seconds"] - seconds["overlapped_seconds"])
        )
    given = documents(capsys, "80b-a3b", "--machine", "epyc-9654", "--memory", "30G", "--disk-speed", "2g")[0]
    assert (given["free_bytes"], given["machine"]["disk"]) == (30 << 30, 2e9)
    assert documents(capsys, "80b-a3b", "--machine", "epyc-9654")[0]["placement"] == "resident"
    wrong = run(capsys, "plan", "80b-a3b", "--machine", "abacus")
    assert wrong.code == 2 and "'abacus': is neither a name (ryzen-9950x" in wrong.error_line


def test_gpus_and_their_price(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "kernel_rates", lambda *given, **named: pytest.fail("measured"))
    arguments = ("80b-a3b", "--machine", "h200", "--scheme", "fp8", "--price-per-hour", "3", "--price-per-kwh", "0.2")
    one, eight = (documents(capsys, *arguments, "--gpus", gpus, "--batch", "8")[0] for gpus in ("1", "8"))
    assert (one["placement"], one["share"]) == ("resident", 1.0)
    assert one["traffic"]["uniform"]["decode"] < one["bounds"]["decode"] < 8 * one["traffic"]["uniform"]["decode"] * 8
    assert one["traffic"]["uniform"]["decode"] < eight["traffic"]["uniform"]["decode"]
    assert one["fitting_sequences"]["262144"] < eight["fitting_sequences"]["262144"]
    seconds = 1e6 / one["traffic"]["uniform"]["decode"]
    cost = one["costs"]["answer"]
    assert cost["kwh"] == pytest.approx(700 * seconds / 3.6e6)
    assert cost["money"] == pytest.approx(3 * seconds / 3600 + 0.2 * cost["kwh"])
    text = run(capsys, "plan", *arguments).out
    assert "at most, by the peaks" in text and "a million tokens of answers" in text and "700 W" in text
    small = run(capsys, "plan", "80b-a3b", "--machine", "rtx-3090", "--scheme", "bf16")
    assert small.code == 4 and "does not fit" in small.out and "records" not in small.err
    wrong = run(capsys, "plan", "80b-a3b", "--machine", "epyc-9654", "--gpus", "2")
    assert wrong.code == 2 and "is none of the GPUs" in wrong.error_line


def test_a_training_run(capsys: Capture) -> None:
    arguments = ("80b-a3b", "qwen3-32b", "--train", "pretrain", "--tokens", "15T", "--machine", "h100")
    found, dense = documents(capsys, *arguments, "--price-per-hour", "2")
    assert found["total_flops"] == pytest.approx(3 * 8.539e9 * 15e12, rel=0.001)
    assert found["device_hours"] == pytest.approx(found["total_flops"] / (0.4 * 989.4e12) / 3600)
    assert found["cost"]["money"] == pytest.approx(2 * found["device_hours"])
    assert found["state_bytes"] == 18 * 81_324_862_720 and found["num_ranks"] == found["least_ranks"]
    assert found["memory_of_rank"]["total"] < 0.9 * (80 << 30)
    others = found["num_ranks"] - 1
    assert found["sent_in_step"]["gradients"] == pytest.approx(others * 4 * 81_324_862_720, rel=1e-3)
    text = run(capsys, "plan", *arguments, "--gpus", "8", "--nodes", "2").out
    assert f"{dense['total_flops'] / found['total_flops']:.2f} times the work of 80b-a3b" in text
    assert "does not fit on 16: " in text and "in 2 nodes" in text
    (adapter,) = documents(capsys, "80b-a3b", "--train", "lora", "--tokens", "1B", "--machine", "h200")
    assert adapter["state_bytes"] < found["state_bytes"] / 50 and adapter["sent_in_step"] is None
    assert adapter["flops_of_token"]["total"] < found["flops_of_token"]["total"]
    for told, *wrong in (
        ("must be one of", "--train", "dream", "--tokens", "1B"),
        ("needs --tokens", "--train", "sft"),
        ("must be one of adamw", "--train", "sft", "--tokens", "1B", "--states", "sgd"),
        ("training is planned on GPUs", "--train", "sft", "--tokens", "1B", "--machine", "epyc-9654"),
        ("no number of tokens", "--train", "sft", "--tokens", "many"),
    ):
        refused = run(capsys, "plan", "80b-a3b", *wrong)
        assert refused.code == 2 and told in refused.err


def test_models_side_by_side(capsys: Capture, rates: None) -> None:
    several = run(capsys, "plan", "80b-a3b", "nano-5m", "qwen3-32b", "--memory", "12G").out
    table, _, below = several.partition("\n\n")
    rows = {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in table.splitlines()[1:]}
    assert table.splitlines()[0].split() == ["80b-a3b", "nano-5m", "qwen3-32b"]
    assert rows["parameters, B"][0] == "81.3" and rows["parameters, B"][2].endswith("(0.40x)")
    assert rows["states"][0] == "75.4 MiB" and rows["states"][2] == "-"
    assert all(f"decode, tokens/s, {name}" in rows for name in TRAFFIC)
    assert rows["decode, tokens/s, uniform"][2] == "does not fit"
    assert [line.split(":")[0] for line in below.splitlines()[1:]] == ["80b-a3b", "nano-5m", "qwen3-32b"]
    assert "(1.00x)" not in run(capsys, "plan", "nano-5m").out


def test_what_a_model_is(capsys: Capture, rates: None) -> None:
    """Parts, what a sequence carries, experts of a batch, and drafts, whose acceptance is an assumption."""
    arguments = ("80b-a3b", "--memory", "60G", "--context", "32k", "--acceptance", "0.9")
    (found,) = documents(capsys, *arguments)
    assert found["context"] == 32_000
    assert (found["parameters"]["trunk"], found["parameters"]["mtp"]) == (79_674_391_296, 1_650_471_424)
    assert sum(found["part_bytes"].values()) == pytest.approx(found["weight_bytes"], rel=0.001)
    by_scheme = found["bytes_by_scheme"]
    assert by_scheme["bf16"]["experts"] == 2 * found["parameters"]["experts"]
    assert sum(count for part, count in by_scheme["fp8"].items() if part != "records") / 2**30 == pytest.approx(
        76.4, abs=0.05
    )
    assert by_scheme["int4-g32"]["records"] == 48 * 512 * 1_769_472 and "records" not in by_scheme["fp8"]
    decode = found["flops"]["decode"]
    assert decode["attention_core"] == 12 * 4 * 16 * 256 * 32_000
    assert sum(count for name, count in decode.items() if name != "total") == decode["total"]
    assert found["kv_bytes_per_token"] == {"bfloat16": 24 << 10, "float8_e4m3fn": 12 << 10, "int8": 12480}
    assert found["distinct_experts"]["64"] == pytest.approx(367, abs=0.5)
    assert found["prefix_cache"]["checkpoints_of_prompt_bytes"] == 8 * found["prefix_cache"]["checkpoint_bytes"]
    assert found["drafts"]["assumed_acceptance"] == 0.9
    assert found["drafts"]["gains"][0]["tokens"] == pytest.approx(1.9)
    text = run(capsys, "plan", *arguments).out
    assert "90% of them accepted (assumed)" in text and "in all                 81,324,862,720" in text
    assert "weights in bf16 151.5 GiB, fp8 76.4 GiB" in text
    assert run(capsys, "plan", "qwen3-32b", "--memory", "60G", "--json").out.count('"drafts": null') == 1


def test_a_calibrated_machine(
    capsys: Capture, rates: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small models are timed once; later plans say where their speeds come from, and what was measured since."""
    thin = calibrate.PROBES["thin"]
    monkeypatch.setattr(calibrate, "PROBES", {"thin": thin})
    monkeypatch.setattr(calibrate, "LENGTHS", (16, 32))
    monkeypatch.setattr(calibrate, "_DEEP_PROBES", ())
    monkeypatch.setattr(calibrate, "_PROMPT_ROUNDS", {16: 1, 32: 1})
    monkeypatch.setattr(limits, "read_bandwidth", lambda: 3e10)
    monkeypatch.setattr(limits, "peak_arithmetic", lambda: {"float32": 1e11, "bfloat16": None, "int8": None})
    before = documents(capsys, "nano-5m")[0]
    assert before["calibration"] is None and before["bounds"] is None
    assert "`qnext plan --calibrate` measures this machine once" in run(capsys, "plan", "nano-5m").out
    result = run(capsys, "plan", "nano-5m", "--calibrate", "--json")
    (file,) = (home / ".cache" / "qnext").iterdir()
    assert result.code == 0 and f"{file}: calibrated" in result.err
    after = json.loads(result.out)[0]
    assert "from 1 small models" in after["calibration"]
    assert after["bounds"]["decode"] == pytest.approx(3e10 / after["bounds"]["bytes_per_token"])
    note_measured(measured_file(file), [MeasuredFigure("2026-11-30", "m", "decode", 512, 12.0, 10.0)])
    text = run(capsys, "plan", "nano-5m").out
    assert "whose times it gives back" in text and "of 1 figure measured here the median error is 20.0%" in text
    other = tmp_path / "other.json"
    assert run(capsys, "plan", "nano-5m", "--calibration", other, "--json").out.count('"calibration": null') == 1
    sft = run(capsys, "plan", "nano-5m", "--train", "sft", "--tokens", "1M")
    assert sft.code == 0 and "hours of this machine at 40% (assumed) of 0.1 TFLOP/s" in sft.out
    file.write_text("{")
    damaged = run(capsys, "plan", "nano-5m")
    assert damaged.code == 0 and "no calibration that can be read" in damaged.err and "not calibrated" in damaged.out


@pytest.mark.parametrize("name", ["plan.svg", "plan.png"])
def test_a_picture(capsys: Capture, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    arguments = ("80b-a3b", "qwen3-32b", "--machine", "h200", "--gpus", "2", "--scheme", "fp8")
    assert run(capsys, "plan", *arguments, "--picture", path).code == 0
    data = path.read_bytes()
    if name.endswith("svg"):
        text = data.decode()
        assert "experts" in text and "80b-a3b, at most" in text and "context, tokens" in text
    else:
        assert data.startswith(b"\x89PNG")
    wrong = run(capsys, "plan", "nano-5m", "--machine", "h200", "--picture", tmp_path / "x.gif")
    assert wrong.code == 2 and "pictures are" in wrong.error_line


def test_a_longer_context_by_yarn(capsys: Capture) -> None:
    arguments = ("80b-a3b", "--machine", "h200", "--gpus", "2", "--context", "1M")
    assert run(capsys, "plan", *arguments).code == 2
    (found,) = documents(capsys, *arguments, "--yarn", "4")
    assert found["context"] == 1 << 20 and "--yarn 4" in found["assumed"]


def test_ranks(capsys: Capture, rates: None) -> None:
    """Each of the eight has an eighth of the experts, half of the heads, and what nobody cuts."""
    (alone,) = documents(capsys, "80b-a3b", "--memory", "24g")
    (plan,) = documents(capsys, "80b-a3b", "--memory", "24g", "--tensor-parallel", 2, "--expert-parallel", 4)
    assert alone["ranks"] is None
    ranks = plan["ranks"]
    assert len(ranks["weight_bytes"]) == 8
    assert sum(ranks["weight_bytes"]) > sum(plan["part_bytes"].values()) > 7 * max(ranks["weight_bytes"])
    assert 2 * ranks["kv_bytes_per_token"] == plan["kv_bytes_per_token"]["bfloat16"]
    assert 2 * ranks["state_bytes_per_sequence"] == plan["state_bytes_per_sequence"]["float32"]["total"]
    experts = 48 * 11 * 2048 * 7 * 4  # the results of eleven experts of each layer, to seven others
    assert ranks["sent_bytes"]["decoded"] > 48 * ranks["sent_bytes"]["sparse"] == experts
    page = run(capsys, "plan", "80b-a3b", "--memory", "24g", "--tensor-parallel", 2, "--expert-parallel", 4).out
    assert "on 8 ranks, 2 x 4" in page and "all ranks send for a decoded token" in page
    refused = run(capsys, "plan", "80b-a3b", "--memory", "24g", "--tensor-parallel", 3)
    assert (refused.code, "num_attention_heads is 16" in refused.err) == (2, True)
    training = run(capsys, "plan", "80b-a3b", "--train", "sft", "--tokens", "1B", "--tensor-parallel", 2)
    assert (training.code, "--tensor-parallel" in training.err) == (2, True)


def test_what_is_wrong_is_said(capsys: Capture, tmp_path: Path) -> None:
    assert run(capsys, "plan", tmp_path / "none").code == 3
    wrong = run(capsys, "plan", "80b-a3b", "--scheme", "int3")
    assert wrong.code == 2 and "no scheme 'int3'" in wrong.error_line
    long = run(capsys, "plan", "nano-5m", "--context", "8193")
    assert long.code == 2 and "beyond the model's context of 8192" in long.error_line


def test_rates_are_measured_here(capsys: Capture) -> None:
    found = documents(capsys, "nano-5m")[0]
    assert 1e8 < found["machine"]["memory"] < 1e13 and 1e8 < found["machine"]["arithmetic"] < 1e15


@needs_kernels
def test_an_answer_is_told_beside_its_prediction(capsys: Capture, tmp_path: Path) -> None:
    config = replace(RECORD_CONFIG, num_experts=16, num_experts_per_tok=4, max_position_embeddings=256)
    path = tmp_path / "m"
    record_folder(path, RecordForm("float16", 4, 32), config=config)
    save_tokenizer(byte_level_tokenizer(), path, model_max_length=256)
    memory = 6 * len(config.layer_types) * read_layout(path).records["model.layers.0"].layout.stride
    arguments = ["generate", path, "Some text", "--max-tokens", "8", "--ignore-eos"]
    err = run(capsys, *arguments, "--expert-memory", memory).err
    kinds = ", ".join(rf"[\d.]+ {name} \(\d+% hits\)" for name in TRAFFIC)
    line = next(line for line in err.splitlines() if line.startswith("predicted"))
    assert re.fullmatch(
        rf"predicted tokens/s: {kinds}; measured [\d.]+ \(\d+% hits, for which [\d.]+ are predicted\)", line
    )
    found = json.loads(run(capsys, *arguments, "--expert-memory", memory, "--json").out)["timings"]
    share = found["experts"]["resident_ratio"]
    assert found["predicted"]["uniform"]["hit_rate"] == pytest.approx(share)
    assert 0 < found["predicted"]["uniform"]["decode"] < found["predicted"]["uniform"]["ceiling"]
    assert "predicted" not in run(capsys, *arguments).err
