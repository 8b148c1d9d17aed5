"""Packages that are missing or too old, and a GPU that is not used: one line each."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from qnext.cli.parsing.requirements import OLDEST_TORCH, missing
from qnext.diagnostics import machine
from qnext.planning import machine as facts

from .command import Capture, run

ROOT = Path(__file__).parents[2]


def test_the_oldest_torch_is_that_of_the_package() -> None:
    (wanted,) = [r for r in map(Requirement, importlib.metadata.requires("qnext") or []) if r.name == "torch"]
    assert str(wanted.specifier) == ">=" + ".".join(map(str, OLDEST_TORCH))


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [
        ("2.10.1", True),
        ("1.13.1+cu117", True),
        ("2.9.0a0+git123", True),
        ("2.11.0", False),
        ("3.0.0", False),
        ("2.13.0+cpu", False),
        ("nightly", False),
    ],
)
def test_an_old_torch(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, is_refused: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    result = run(capsys, "generate", tmp_path / "none", "x")
    assert result.code == (2 if is_refused else 3)
    assert (f"torch {version} is too old, 2.11 or newer is needed" in result.error_line) == is_refused
    assert run(capsys, "generate", "--help").code == 0
    assert "too old" not in run(capsys, "keys", "list", "--file", tmp_path / "none").err


@pytest.mark.parametrize("package", ["torch", "typer", "tokenizers", "yaml"])
def test_a_missing_package(package: str, tmp_path: Path) -> None:
    """As in an interpreter where it was never installed."""
    (tmp_path / "f.yaml").write_text("seed: 1\n")
    words = ["init", "nano-5m", "out", *(["--config", "f.yaml"] if package == "yaml" else [])]
    done = run_without(package, words, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"qnext init: the Python package {package} is not installed: pip install {package}")
    assert len(done.stderr.splitlines()) == 1


def test_the_doctor_looks_on_without_torch(tmp_path: Path) -> None:
    done = run_without("torch", ["doctor"], tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch cannot be imported" in " ".join(done.stdout.split()) and "processor" in done.stdout


def run_without(package: str, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules[{package!r}] = None; from qnext.cli import main; main({words!r})"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )


def test_what_a_failed_import_says() -> None:
    assert missing(ModuleNotFoundError("No module named 'qnext.x'", name="qnext.x")) is None
    assert missing(ImportError("cannot import name 'x'")) is None
    text = missing(ImportError("libc10.so: cannot open\nshared object", name="torch._C"))
    assert text == "the Python package torch cannot be loaded: libc10.so: cannot open shared object"


def test_a_gpu_that_torch_sees_is_said_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    finding = machine._gpu()
    assert finding.status == "ok" and finding.data["is_used"] is True
    assert (
        finding.text
        == "NVIDIA H200 (141 GiB), NVIDIA H200 (141 GiB): computes where the weights of a model fit (--device)"
    )


@pytest.mark.parametrize("kind", ["nvidia", "amd", "processors", "none", "odd"])
def test_a_gpu_that_only_its_driver_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """Formats of /proc/driver/nvidia and of amdkfd's topology in sysfs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    drivers, kfd = tmp_path / "gpus", tmp_path / "topology"
    files = {
        "nvidia": (drivers / "0000:01:00.0/information", "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   96\n"),
        "amd": (kfd / "nodes/1/properties", "cpu_cores_count 0\nsimd_count 304\n"),
        "processors": (kfd / "nodes/0/properties", "cpu_cores_count 16\nsimd_count 0\n"),
        "odd": (drivers / "x/information", "\x00\xff nothing"),
    }
    if kind in files:
        file, text = files[kind]
        file.parent.mkdir(parents=True)
        file.write_text(text)
    monkeypatch.setattr(facts, "gpus_of_drivers", partial(facts.gpus_of_drivers, drivers, kfd))
    finding = machine._gpu()
    names = {"nvidia": "NVIDIA GeForce RTX 4090", "amd": "AMD GPU"}
    expected = (
        f"{names[kind]}: not used, qnext computes on the CPU"
        if kind in names
        else "none found; qnext computes on the CPU"
    )
    assert finding.text.startswith(expected)
