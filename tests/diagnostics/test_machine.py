"""Findings about machine and kernels: each kind of trouble is seen."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qnext.diagnostics import kernels, machine
from qnext.diagnostics.finding import Finding
from qnext.ops import backends, cpu
from qnext.ops.backends import cpu_kernels
from qnext.planning import machine as facts

needs_native = pytest.mark.skipif(cpu_kernels() is None, reason="needs the native kernels")


def one(findings: Any, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    assert isinstance(found, Finding)
    assert found.advice or found.status == "ok"
    return found


@needs_native
@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("linear", "linear int4"),
        ("experts_swiglu", "experts"),
        ("rms_norm", "norm"),
        ("gated_delta_mixer", "delta rule"),
        ("attention_mixer", "attention"),
    ],
)
def test_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, function: str, name: str) -> None:
    """Each op does go through the native module, and an error of some per cent is seen in it alone."""
    right = getattr(cpu, function)
    monkeypatch.setattr(cpu, function, lambda *values, **named: right(*values, **named) * 1.05)
    finding = kernels.self_test()
    assert finding.status == "problem"
    wrong = {key for key, value in finding.data.items() if value["error"] > value["tolerance"]}
    assert wrong == ({"linear fp32", "linear bf16", "linear int4"} if function == "linear" else {name})
    assert name in finding.advice


def test_the_test_leaves_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    if cpu_kernels() is not None:
        kernels.kernel_errors()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("value", "status", "text"),
    [
        ("torch", "warning", "torch, as QNEXT_BACKEND says"),
        ("reference", "warning", "reference, as QNEXT_BACKEND says"),
        ("gpu", "problem", "must be 'cpu', 'torch'"),
    ],
)
def test_backends(monkeypatch: pytest.MonkeyPatch, value: str, status: str, text: str) -> None:
    monkeypatch.setenv("QNEXT_BACKEND", value)
    monkeypatch.setattr(backends, "cpu_kernels", backends.cpu_kernels.__wrapped__)
    finding = one(machine._kernels(), "backend")
    assert (finding.status, text in finding.text) == (status, True)
    if status == "warning":
        assert (finding.data["backend"], finding.data["variable"]) == ("torch", value)


def test_kernels_that_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("no module _native")

    monkeypatch.delenv("QNEXT_BACKEND", raising=False)
    monkeypatch.setattr(backends, "cpu_kernels", backends.cpu_kernels.__wrapped__)
    monkeypatch.setattr(backends.importlib, "import_module", missing)
    finding = one(machine._kernels(), "backend")
    assert (finding.status, "no module _native" in finding.text) == ("warning", True)


def test_packages_out_of_range() -> None:
    finding = machine._packages(["torch<2", "no-such-package>=1", "rich>=1", "absent; extra == 'dev'"])
    assert finding.status == "problem"
    assert "torch" in finding.text
    assert "no-such-package is missing" in finding.text
    assert "rich" not in finding.text
    assert finding.advice == "pip install 'torch<2' 'no-such-package>=1'"
    assert machine._packages(["rich>=1"]).status == "ok"


def test_a_share_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = facts.Processor("a chip", num_cores=8, num_allowed=4, quota=0.5, features=("avx2",))
    monkeypatch.setattr(facts, "processor", lambda: cpu)
    finding = machine._processor()
    assert (finding.status, finding.data["quota"]) == ("warning", 0.5)
    assert finding.text == "a chip, 8 cores, 0.5 for this process; avx2"
    assert "OMP_NUM_THREADS=1" in finding.advice
    monkeypatch.setattr(facts, "processor", lambda: dataclasses.replace(cpu, quota=None))
    assert machine._processor().status == "ok"


def test_low_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "available_bytes", lambda: 1 << 30)
    assert machine._memory().status == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    assert [finding.status for finding in machine._disks()] == ["warning", "warning"]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert "ulimit" in machine._open_files().advice
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert machine._huge_pages(tmp_path / "enabled").status == "warning"
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert machine._huge_pages(tmp_path / "enabled").data == {"mode": "madvise"}
    assert machine._huge_pages(tmp_path / "none").status == "ok"
