"""Training: losses, weights and snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from qnext.checkpoint.snapshot import list_snapshots, load_snapshot
from tests.other_device.device import OtherDevice, moved, other_device
from tests.training.models import tiny_model
from tests.training.test_loop import CONFIG, make_trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_and_snapshots_are_those_of_the_cpu(optimizer: str, tmp_path: Path, other: OtherDevice) -> None:
    config = CONFIG.with_(optimizer=optimizer, total_steps=3, snapshot_every=2, precision="float32")
    here, there = tiny_model(), moved(tiny_model())
    for model, name in ((here, "here"), (there, "there")):
        make_trainer(config, model=model, folder=tmp_path / name).run()
    for (name, mine), its in zip(here.named_parameters(), there.parameters(), strict=True):
        assert its.device == other_device()
        torch.testing.assert_close(its.detach().cpu(), mine.detach(), rtol=1e-3, atol=1e-4, msg=name)
    for kind, tensors in _snapshot(tmp_path / "here").items():
        for name, tensor in _snapshot(tmp_path / "there")[kind].items():
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-4, msg=name)
    resumed = make_trainer(config, model=moved(tiny_model(seed=4)), folder=tmp_path / "there")
    resumed.resume()
    resumed.run()
    for its, again in zip(there.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(its.detach().cpu(), again.detach().cpu())


def _snapshot(folder: Path) -> Mapping[str, Mapping[str, torch.Tensor]]:
    (path,) = list_snapshots(folder / "snapshots")
    snapshot = load_snapshot(path)
    assert snapshot.step == 2
    return {kind: snapshot.tensors[kind] for kind in ("model", "optimizer")}
