"""What a run tells TensorBoard and Weights & Biases, and that no failure of theirs ends it."""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qnext.errors import QnextWarning, UsageError
from qnext.training import Hooks, StepMetrics
from qnext.training.event_file import EventFile
from qnext.training.loggers import check_names, logged
from tests.training.test_loop import CONFIG, make_trainer


@dataclass(frozen=True)
class Result:
    bits: float


def run(folder: Path, *names: str, steps: int = 3) -> list[StepMetrics]:
    seen: list[StepMetrics] = []
    config = CONFIG.with_(accumulation=1, total_steps=steps, eval_every=2, sample_every=2)
    hooks = Hooks(on_step=seen.append, evaluate=lambda: Result(1.25), on_sample=lambda step: f"def <f>{step}")
    trainer = make_trainer(config, folder=folder, hooks=hooks)
    with logged(trainer, folder, names):
        trainer.run()
    assert trainer.hooks is hooks and trainer.step == steps
    return seen


def test_tensorboard_reads_the_run(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = run(tmp_path, "tensorboard")
    found = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(each.step, each.value) for each in found.Scalars("loss")]
    assert losses == [(step.step, pytest.approx(step.loss)) for step in seen]
    assert [each.value for each in found.Scalars("evaluation/bits")] == [1.25]
    assert {"health/grad_norms/matrix", "health/decay/0", "experts/num_dead/2"} & set(found.Tags()["scalars"]) == {
        "health/grad_norms/matrix",
        "experts/num_dead/2",
    }
    assert found.Tags()["tensors"] == ["sample"]
    assert found.Tensors("sample")[0].tensor_proto.string_val[0] == b"def <f>2"


def test_a_run_that_went_on_from_an_earlier_step_replaces_what_came_after(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps, value in (((1, 2, 3), 1.0), ((2, 3, 4), float("inf"))):
        file = EventFile(tmp_path)
        for step in steps:
            file.write(step, {"loss": value})
    found = reading.EventAccumulator(str(tmp_path)).Reload()
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [
        (1, 1.0),
        *((step, float("inf")) for step in (2, 3, 4)),
    ]


def test_records_have_the_checksums_of_the_format(tmp_path: Path) -> None:
    EventFile(tmp_path).write(7, {"loss": 0.5})
    data = next(tmp_path.iterdir()).read_bytes()
    # 24 bytes, as TensorFlow's writer begins every file but for the time; the masked checksum of this length is known.
    assert data[:8] == struct.pack("<Q", 24) and data[8:12] == bytes.fromhex("a37f4b22")
    assert data[12:13] == b"\x09" and data[21:36] == b"\x1a\x0dbrain.Event:2"


class Service(ModuleType):
    """The interface of wandb as the log uses it. `fails` is the call that fails."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails = fails
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.is_finished = False

    def _fail(self, call: str) -> None:
        if call == self.fails:
            raise RuntimeError("no network\nat all")

    def init(self, **options: Any) -> Service:
        self._fail("init")
        self.begun = options
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self._fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._fail("finish")
        self.is_finished = True


def test_wandb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    seen = run(tmp_path / "mine", "wandb")
    assert service.begun["project"] == "qnext" and service.begun["name"] == "mine"
    assert service.begun["config"]["lr"] == CONFIG.lr
    steps = [(step, values["loss"]) for step, values in service.logged if "loss" in values]
    assert steps == [(each.step, each.loss) for each in seen]
    assert (2, {"evaluation/bits": 1.25}) in service.logged and (2, {"sample": "def <f>2"}) in service.logged
    assert service.is_finished


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_service_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Service(fails))
    with pytest.warns(QnextWarning, match="--log wandb: no network at all; the run goes on") as warned:
        run(tmp_path, "wandb", "tensorboard")
    assert len(warned) == 1
    assert list((tmp_path / "tensorboard").iterdir()), "the other log is not touched"


def test_a_package_that_is_missing_is_one_warning_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(QnextWarning, match=r"pip install 'qnext\[watch\]'") as warned:
        run(tmp_path, "wandb")
    assert len(warned) == 1


def test_a_log_that_there_is_not() -> None:
    with pytest.raises(UsageError, match="--log tensorbord: expected tensorboard or wandb; did you mean tensorboard"):
        check_names(["tensorbord"])
