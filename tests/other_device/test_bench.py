"""What `qnext bench` measures of a model on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qnext.bench.workers import qnext_worker
from qnext.checkpoint import save_model
from qnext.session import folder as session
from tests.engine.models import tiny_model
from tests.other_device.device import OtherDevice, other_device


def test_figures_of_a_model_there(tmp_path: Path, other: OtherDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny_model("hybrid"), tmp_path / "m")
    monkeypatch.setattr(session, "check_device", lambda name: None)
    monkeypatch.setattr(session, "choose_device", lambda wanted: torch.device(wanted.device))
    threads, there = torch.get_num_threads(), str(other_device())
    step = qnext_worker(folder=str(tmp_path / "m"), dtype=None, threads=threads, decode_tokens=2, device=there)
    before = other.num_reads
    assert all(step(*figure) > 0 for figure in (("prefill", 20), ("decode", 0), ("decode", 9), ("generate",)))
    assert other.num_reads > before
    facts = step("facts")
    assert facts["kernels"] == "torch" and facts["host_peak_bytes"] > 0
    assert facts["peak_bytes"] >= facts["peak_bytes_loaded"] > facts["weight_bytes"] > 0
