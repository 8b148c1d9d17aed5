from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.checkpoint import snapshot as snapshot_module
from qnext.checkpoint.snapshot import Snapshot, list_snapshots, load_snapshot, save_snapshot
from qnext.errors import CorruptCheckpoint, DiskFull, QnextWarning
from qnext.planning import machine
from qnext.training import Hooks, StepMetrics, TrainConfig, saving
from qnext.training.snapshot_writer import SnapshotFailed
from tests.training.models import documents, tiny_model
from tests.training.test_loop import CONFIG, make_trainer

CLOCK = ("elapsed", "tokens_per_second")


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("mtp_start", "parallel"), [(0.0, 1), (0.7, 1), (0.7, 2)])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str, mtp_start: float, parallel: int) -> None:
    config = CONFIG.with_(
        optimizer=optimizer, mtp_start=mtp_start, parallel_batches=parallel, warmup_fraction=0.3, decay_fraction=0.5
    )
    straight = tiny_model()
    make_trainer(config, model=straight, folder=tmp_path / "straight").run()

    first = make_trainer(config, folder=tmp_path / "cut")
    first.run(until_step=3)
    first.save()
    first.run(until_step=5)  # went on beyond its snapshot before it was killed
    torch.manual_seed(99)
    resumed = tiny_model(seed=7)
    second = make_trainer(config, model=resumed, folder=tmp_path / "cut")
    assert second.resume() == tmp_path / "cut" / "snapshots" / "step-00000003"
    assert second.step == 3
    second.run()

    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "cut")


def test_random_state_comes_back(tmp_path: Path) -> None:
    first = make_trainer(folder=tmp_path)
    first.run(until_step=1)
    first.save()
    drawn = torch.rand(5)
    torch.manual_seed(1234)
    make_trainer(folder=tmp_path).resume()
    assert torch.equal(torch.rand(5), drawn)


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert make_trainer(folder=tmp_path).resume() is None


def test_snapshots_of_the_loop_keep_the_newest(tmp_path: Path) -> None:
    config = CONFIG.with_(snapshot_every=1, keep_snapshots=2, accumulation=1)
    make_trainer(config, folder=tmp_path).run(until_step=4)
    assert [p.name for p in list_snapshots(tmp_path / "snapshots")] == ["step-00000003", "step-00000004"]
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_snapshot_that_is_written_later_holds_what_was_there_when_it_was_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """No file is begun before the next update is over; every byte is that of a snapshot that training waited for."""
    config = CONFIG.with_(optimizer=optimizer, accumulation=1, spike_skip=6.0)
    waited = make_trainer(config, folder=tmp_path / "waited")
    waited.run(until_step=2)
    waited.save()
    may_write, write = threading.Event(), snapshot_module.save_snapshot

    def write_late(*arguments: Any, **options: Any) -> Path:
        assert may_write.wait(60)
        return write(*arguments, **options)

    def at_step(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            may_write.set()

    monkeypatch.setattr(saving, "save_snapshot", write_late)
    seen: list[Path] = []
    hooks = Hooks(on_step=at_step, on_snapshot=seen.append)
    make_trainer(config.with_(snapshot_every=2), folder=tmp_path / "late", hooks=hooks).run(until_step=3)
    one, other = (tmp_path / name / "snapshots" / "step-00000002" for name in ("waited", "late"))
    assert seen == [other]
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name
    states = [json.loads((path / "state.json").read_text())["state"] for path in (one, other)]
    for state in states:
        del state["elapsed"], state["step_seconds"], state["config"]
    assert states[0] == states[1]


def test_training_waits_for_a_snapshot_where_no_memory_is_left_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []

    def write(*arguments: Any, **options: Any) -> Path:
        threads.append(threading.current_thread() is threading.main_thread())
        return snapshot_module.save_snapshot(*arguments, **options)

    monkeypatch.setattr(saving, "save_snapshot", write)
    config = CONFIG.with_(snapshot_every=1, accumulation=1)
    for free in (1 << 40, 1000):
        monkeypatch.setattr(machine, "available_bytes", lambda free=free: free)
        make_trainer(config, folder=tmp_path / str(free)).run(until_step=1)
        assert [path.name for path in list_snapshots(tmp_path / str(free) / "snapshots")] == ["step-00000001"]
    assert threads == [False, True]


def saved(folder: Path, config: TrainConfig = CONFIG) -> Path:
    trainer = make_trainer(config, folder=folder)
    trainer.run(until_step=1)
    return trainer.save()


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="adamw"):
        make_trainer(CONFIG.with_(optimizer="muon"), folder=tmp_path).resume()


def test_other_documents_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="other documents"):
        make_trainer(folder=tmp_path, docs=documents([50, 20])).resume()


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"tensor .*gate_up_proj"):
        make_trainer(folder=tmp_path, model=tiny_model(moe_intermediate_size=16)).resume()
    with pytest.raises(CorruptCheckpoint, match="tensor mtp"):
        make_trainer(folder=tmp_path, model=tiny_model(num_nextn_predict_layers=0)).resume()


@pytest.mark.parametrize("name", ["model", "optimizer", "random"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    file = saved(tmp_path) / f"{name}.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-5])
    elif damage == "flip":
        data[-3] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(CorruptCheckpoint, match=f"{name}.safetensors"):
        make_trainer(folder=tmp_path).resume()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "qnext-snapshot-1", "step": 1, "files": {}}'])
def test_a_damaged_state_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path)
    (path / "state.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=r"state\.json"):
        make_trainer(folder=tmp_path).resume()


def test_a_file_name_cannot_leave_the_snapshot(tmp_path: Path) -> None:
    path = saved(tmp_path)
    document = json.loads((path / "state.json").read_text())
    document["files"]["../../metrics.jsonl"] = document["files"].pop("model.safetensors")
    (path / "state.json").write_text(json.dumps(document))
    with pytest.raises(CorruptCheckpoint, match="malformed"):
        load_snapshot(path)


def test_a_half_written_snapshot_is_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"model": {"w": torch.arange(6.0)}}
    save_snapshot(tmp_path, Snapshot(1, tensors, {"a": 1}), keep=2)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("qnext.files.folders.os.rename", fail)
    with pytest.raises(OSError, match="disk full"):
        save_snapshot(tmp_path, Snapshot(2, tensors, {}), keep=2)
    monkeypatch.undo()
    assert [p.name for p in list_snapshots(tmp_path)] == ["step-00000001"]
    save_snapshot(tmp_path, Snapshot(2, {"model": {"w": torch.zeros(2)}}, {"a": 2}), keep=2)
    newest = load_snapshot(list_snapshots(tmp_path)[-1])
    assert newest.state == {"a": 2} and newest.tensors["model"]["w"].tolist() == [0.0, 0.0]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def three(folder: Path, *, keep: int = 3) -> Path:
    for step in (1, 2, 3):
        save_snapshot(folder / "snapshots", small(step), keep=keep)
    return folder / "snapshots"


def small(step: int) -> Snapshot:
    return Snapshot(step, {"model": {"w": torch.full((3,), float(step))}}, {})


@pytest.mark.parametrize("damage", ["cut", "removed file", "removed state", "unreadable"])
def test_a_damaged_newest_snapshot_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    config = CONFIG.with_(snapshot_every=1, keep_snapshots=3, accumulation=1)
    make_trainer(config, folder=tmp_path).run(until_step=3)
    newest = tmp_path / "snapshots" / "step-00000003"
    file = newest / "optimizer.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "removed file":
        file.unlink()
    elif damage == "removed state":
        (newest / "state.json").unlink()
    else:
        file.unlink()
        file.mkdir()
    trainer = make_trainer(config, folder=tmp_path)
    with pytest.warns(QnextWarning, match="step-00000003.*goes on from step-00000002") as warned:
        assert trainer.resume() == tmp_path / "snapshots" / "step-00000002"
    assert len(warned) == 1 and trainer.step == 2
    trainer.run(until_step=3)  # takes the place of the damaged one
    again = make_trainer(config, folder=tmp_path)
    assert again.resume() == newest


def test_what_does_not_belong_to_the_run_is_refused_and_no_older_one_is_tried(tmp_path: Path) -> None:
    config = CONFIG.with_(snapshot_every=1, keep_snapshots=3, accumulation=1)
    make_trainer(config, folder=tmp_path).run(until_step=2)
    with pytest.raises(CorruptCheckpoint, match=r"step-00000002.*adamw"):
        make_trainer(config.with_(optimizer="muon"), folder=tmp_path).resume()


def test_where_every_snapshot_is_damaged_the_newest_is_named(tmp_path: Path) -> None:
    for path in three(tmp_path).iterdir():
        (path / "state.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"step-00000003/state\.json: missing"):
        make_trainer(folder=tmp_path).resume()


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_loses_neither_its_snapshot_nor_the_later_ones(tmp_path: Path, keep: int) -> None:
    folder = three(tmp_path)
    save_snapshot(folder, small(2), keep=keep)
    kept = ["step-00000002", "step-00000003"] if keep == 1 else ["step-00000001", "step-00000002", "step-00000003"]
    assert [path.name for path in list_snapshots(folder)] == kept


def full_after(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """The disk takes so many bytes more, the last write only in part."""
    write, left = os.write, [num_bytes]

    def limited(descriptor: int, data: bytes) -> int:
        if descriptor > 2 and left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_written = write(descriptor, memoryview(data)[: left[0]] if descriptor > 2 else data)
        left[0] -= num_written if descriptor > 2 else 0
        return num_written

    monkeypatch.setattr(os, "write", limited)


@pytest.mark.parametrize("room", [0, 10, 5000])
def test_a_full_disk_costs_a_snapshot_on_the_way_and_not_the_run(tmp_path: Path, room: int) -> None:
    config = CONFIG.with_(snapshot_every=1, accumulation=1)
    patch = pytest.MonkeyPatch()

    def at_step(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            full_after(patch, room)

    trainer = make_trainer(config, folder=tmp_path, hooks=Hooks(on_step=at_step))
    trainer.run(until_step=1)  # with its snapshot on the disk
    with pytest.warns(QnextWarning) as warned:
        trainer.run(until_step=2)
    patch.undo()
    lines = [str(each.message) for each in warned if "snapshots" in str(each.message)]
    assert len(lines) == 1
    assert lines[0].startswith(str(tmp_path / "snapshots" / "step-00000002")) and "No space left on device" in lines[0]
    assert "the newest is step-00000001" in lines[0] and "tries again at step 3" in lines[0]
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000001"]
    trainer.run(until_step=3)
    assert make_trainer(config, folder=tmp_path).resume() == tmp_path / "snapshots" / "step-00000003"


def test_a_full_disk_at_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(folder=tmp_path)
    trainer.run(until_step=1)
    trainer.save()
    trainer.run(until_step=2)
    full_after(monkeypatch, 100)
    with pytest.raises(SnapshotFailed, match=r"No space left on device; .*the newest is step-00000001") as caught:
        trainer.save()
    assert caught.value.exit_code == DiskFull.exit_code
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000001"]


def test_the_metrics_of_a_full_disk_are_lost_and_the_line_before_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(folder=tmp_path)
    trainer.run(until_step=1)
    with monkeypatch.context() as patch:
        trainer.run(until_step=1)  # opens the file
        full_after(patch, 7)
        with pytest.warns(QnextWarning, match=r"metrics\.jsonl: No space left on device; .*lines of metrics are lost"):
            trainer._metrics.write_evaluation(1, trainer.config)  # type: ignore[union-attr]
    assert [line["step"] for line in metrics(tmp_path)] == [1]
