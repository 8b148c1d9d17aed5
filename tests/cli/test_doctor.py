"""`qnext doctor`: findings about the machine, the kernels and a model; each kind of trouble is seen."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.checkpoint.check import read_layout
from qnext.diagnostics import machine
from qnext.diagnostics.finding import Finding
from qnext.ops.backends import cpu_kernels, instruction_set
from qnext.ops.expert_rates import KernelRates
from qnext.planning import machine as facts
from qnext.planning.expert_memory import engine_reserve
from qnext.session import planned
from qnext.text.train import byte_level_tokenizer, save_tokenizer
from tests.checkpoint.record_folders import RecordForm, record_folder

from .command import Capture, edit_json, make_model, poke, run


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is somebody else's test."""
    monkeypatch.setattr(machine, "machine_findings", lambda: iter([Finding("python", "ok", "some")]))


def by_name(findings: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in findings}


def test_machine(capsys: Capture) -> None:
    result = run(capsys, "doctor", "--json")
    document = json.loads(result.out)
    found = by_name(document["machine"])
    problems = [name for name, finding in found.items() if finding["status"] == "problem"]
    assert (result.code, document["ok"]) == ((1, False) if problems else (0, True))
    assert found["memory"]["data"]["free_bytes"] > 0
    assert 1 <= found["processor"]["data"]["allowed"] <= found["processor"]["data"]["cores"]
    assert found["packages"]["data"]["torch"] == importlib.metadata.version("torch")
    assert all(finding["advice"] for finding in document["machine"] if finding["status"] != "ok")
    if cpu_kernels() is not None:
        assert found["backend"]["data"]["instruction_set"] == cpu_kernels().isa()
        assert found["kernel test"]["status"] == "ok"


def test_a_table_for_people(
    capsys: Capture, chat_folder: Path, quiet_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    result = run(capsys, "doctor", chat_folder)
    assert (result.code, result.err) == (0, "0 problems, 0 warnings\n")
    lines = result.out.splitlines()
    assert any("memory plan" in line and "sequences of 256 tokens" in line for line in lines)
    assert any("chat format" in line and "instruct" in line for line in lines)
    assert "\x1b[32m" not in result.out  # green


def test_a_sound_model(capsys: Capture, plain_folder: Path, quiet_machine: None) -> None:
    result = run(capsys, "doctor", plain_folder, "--json")
    found = by_name(json.loads(result.out)["model"])
    assert result.code == 0
    assert [finding["status"] for finding in found.values()] == ["ok"] * 6
    plan = found["memory plan"]["data"]
    shards = sum(path.stat().st_size for path in plain_folder.glob("*.safetensors"))
    assert 0.8 * shards < plan["weight_bytes"] < shards  # headers are no weights
    assert plan["kv_bytes_per_1000_tokens"] == 1000 * 1 * 2 * 2 * 10 * 2  # a layer, keys and values, heads, dim, bf16
    assert plan["sequences"][0]["fit"] > 0
    assert found["chat format"]["data"]["name"] is None
    assert found["sampling"]["text"] == "by default greedy"


def test_values_are_read_unless_quick(tmp_path: Path, capsys: Capture, quiet_machine: None) -> None:
    folder = make_model(tmp_path)
    poke(folder, "model.layers.1.mlp.gate.weight", b"\xc0\x7f")  # NaN
    assert run(capsys, "doctor", folder, "--quick").code == 0
    result = run(capsys, "doctor", folder, "--json")
    finding = by_name(json.loads(result.out)["model"])["checkpoint"]
    assert result.code == 5
    assert "model.layers.1.mlp.gate.weight holds NaN" in finding["data"]["problems"][0]


DAMAGES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "configuration": (lambda f: edit_json(f / "config.json", lambda v: v.update(num_experts=0)), 5, "checkpoint"),
    "missing tensor": (lambda f: edit_json(f / "config.json", lambda v: v.update(hidden_size=64)), 5, "checkpoint"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 5, "checkpoint"),
    "template": (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), 1, "chat format"),
    "sampling": (lambda f: edit_json(f / "generation_config.json", lambda v: v.update(top_p=7)), 1, "sampling"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_damage_is_a_problem(tmp_path: Path, capsys: Capture, quiet_machine: None, name: str, quick: list[str]) -> None:
    folder = make_model(tmp_path)
    damage, code, finding = DAMAGES[name]
    damage(folder)
    result = run(capsys, "doctor", folder, "--json", *quick)
    document = json.loads(result.out)
    assert (result.code, document["ok"], result.err) == (code, False, "")
    assert by_name(document["model"])[finding]["status"] == "problem"


def test_no_such_model(tmp_path: Path, capsys: Capture) -> None:
    result = run(capsys, "doctor", tmp_path / "nothing")
    assert (result.code, "no such folder" in result.error_line) == (3, True)


def test_a_model_that_does_not_fit(
    capsys: Capture, plain_folder: Path, quiet_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "available_bytes", lambda: 1000)
    result = run(capsys, "doctor", plain_folder, "--json")
    finding = by_name(json.loads(result.out)["model"])["memory plan"]
    assert (result.code, finding["status"]) == (1, "problem")
    assert "qnext quantize" in finding["advice"]


@pytest.mark.skipif(instruction_set() is None, reason="records are read by the native kernels")
def test_experts_on_disk_are_planned(
    tmp_path: Path, capsys: Capture, quiet_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `qnext plan` says: all of the model fits, half of its experts do, or nothing does."""
    folder = tmp_path / "m"
    record_folder(folder, RecordForm("float16", 4, 32))
    save_tokenizer(byte_level_tokenizer(), folder, model_max_length=64)
    monkeypatch.setattr(planned, "kernel_rates", lambda config, is_quantized: KernelRates(30e9, 2e12))
    experts = planned.planned_folder("m", layout := read_layout(folder)).sizes.experts
    reserve = engine_reserve(layout.config, num_threads=torch.get_num_threads())
    found = {}
    for share in (2.0, 0.5, -1.0):
        free = reserve + experts.other_bytes + int(share * experts.all_bytes)
        monkeypatch.setattr(facts, "available_bytes", lambda free=free: free)
        result = run(capsys, "doctor", folder, "--json", "--quick")
        found[share] = by_name(json.loads(result.out)["model"])
        assert result.code == (0 if share > 0 else 1)
    assert "sequences of" in found[2.0]["memory plan"]["text"]
    assert found[2.0]["speed"]["data"]["placement"] == "resident"
    half, none = found[0.5], found[-1.0]
    assert "of them stay in memory" in half["memory plan"]["text"]
    assert 0.2 < half["speed"]["data"]["share"] < 0.6 and "service" in half["speed"]["text"]
    assert none["memory plan"]["status"] == "problem" and "speed" not in none
    assert "experts on disk need" in none["memory plan"]["text"]
