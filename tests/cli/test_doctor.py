"""`qnext doctor`: findings about the machine, the kernels and a model; each kind of trouble is seen."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qnext.cli import _doctor, _doctor_kernels
from qnext.cli._doctor import Finding
from qnext.engine import memory
from qnext.ops import backend
from qnext.ops.backend import native_module

from .command import Capture, edit_json, make_model, poke, run

needs_native = pytest.mark.skipif(native_module() is None, reason="needs the native kernels")


@pytest.fixture
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is somebody else's test."""
    monkeypatch.setattr(_doctor, "machine_findings", lambda: iter([Finding("python", "ok", "some")]))


def by_name(findings: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in findings}


def one(findings: Any, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    assert isinstance(found, Finding)
    assert found.advice or found.status == "ok"
    return found


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
    if native_module() is not None:
        assert found["backend"]["data"]["instruction_set"] == native_module().isa()
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
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    result = run(capsys, "doctor", plain_folder, "--json")
    finding = by_name(json.loads(result.out)["model"])["memory plan"]
    assert (result.code, finding["status"]) == (1, "problem")
    assert "qnext quantize" in finding["advice"]


@needs_native
@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        ("qnext.ops.cpu.linear", "linear", "linear int4"), ("qnext.ops.cpu.linear", "experts", "experts"),
        ("qnext.ops.cpu.rows", "rms_norm", "norm"), ("qnext.ops.delta_mixer", "native_mixer", "delta rule"),
        ("qnext.ops.cpu.attention", "attention_mixer", "attention"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, module: str, function: str, name: str) -> None:
    """Each op does go through the native module, and an error of some per cent is seen in it alone."""
    place = importlib.import_module(module)
    right = getattr(place, function)
    monkeypatch.setattr(place, function, lambda *values, **named: right(*values, **named) * 1.05)
    finding = _doctor_kernels.self_test()
    assert finding.status == "problem"
    wrong = {key for key, value in finding.data.items() if value["error"] > value["tolerance"]}
    assert wrong == ({"linear fp32", "linear bf16", "linear int4"} if function == "linear" else {name})
    assert name in finding.advice


def test_the_test_leaves_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    if native_module() is not None:
        _doctor_kernels.kernel_errors()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("value", "status", "text"),
    [("reference", "warning", "reference, as QNEXT_BACKEND says"), ("gpu", "problem", "must be 'cpu' or 'reference'")],
)
def test_backends(monkeypatch: pytest.MonkeyPatch, value: str, status: str, text: str) -> None:
    monkeypatch.setenv("QNEXT_BACKEND", value)
    monkeypatch.setattr(backend, "native_module", backend.native_module.__wrapped__)
    finding = one(_doctor._kernels(), "backend")
    assert (finding.status, text in finding.text) == (status, True)


def test_kernels_that_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("no module _native")

    monkeypatch.delenv("QNEXT_BACKEND", raising=False)
    monkeypatch.setattr(backend, "native_module", backend.native_module.__wrapped__)
    monkeypatch.setattr(backend.importlib, "import_module", missing)
    finding = one(_doctor._kernels(), "backend")
    assert (finding.status, "no module _native" in finding.text) == ("warning", True)


def test_packages_out_of_range() -> None:
    finding = _doctor._packages(["torch<2", "no-such-package>=1", "rich>=1", "absent; extra == 'dev'"])
    assert finding.status == "problem"
    assert "torch" in finding.text
    assert "no-such-package is missing" in finding.text
    assert "rich" not in finding.text
    assert finding.advice == "pip install 'torch<2' 'no-such-package>=1'"
    assert _doctor._packages(["rich>=1"]).status == "ok"


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Version 2 by the nearest group with a limit; version 1 below the folder of its controller."""
    own = tmp_path / "own"
    root = tmp_path / "cgroup"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (root / "a" / "cpu.max").write_text("150000 100000\n")
    own.write_text("0::/a/b\n")
    assert _doctor.group_limit("cpu.max", "cpu.cfs_quota_us", root=root, own=own) == "150000 100000"
    assert _doctor.group_limit("memory.max", "memory.limit_in_bytes", root=root, own=own) is None
    (root / "memory" / "job").mkdir(parents=True)
    (root / "memory" / "job" / "memory.limit_in_bytes").write_text("1024\n")
    own.write_text("4:memory:/job\n2:cpu,cpuacct:/\n0::/\n")
    assert _doctor.group_limit("memory.max", "memory.limit_in_bytes", root=root, own=own) == "1024"
    assert _doctor.group_limit("cpu.max", "cpu.cfs_quota_us", root=root, own=tmp_path / "none") is None


def test_a_share_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "group_limit", lambda name, v1_name: "50000 100000")
    finding = _doctor._processor()
    assert (finding.status, finding.data["quota"]) == ("warning", 0.5)
    assert "OMP_NUM_THREADS=1" in finding.advice
    monkeypatch.setattr(_doctor, "group_limit", lambda name, v1_name: None)
    assert _doctor._processor().status == "ok"


def test_low_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1 << 30)
    assert _doctor._memory().status == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    assert [finding.status for finding in _doctor._disks()] == ["warning", "warning"]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert "ulimit" in _doctor._open_files().advice
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert _doctor._huge_pages(tmp_path).status == "warning"
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert _doctor._huge_pages(tmp_path).data == {"mode": "madvise"}
    assert _doctor._huge_pages(tmp_path / "none").status == "ok"
