"""A thread that writes: the same files, errors that are not lost, a bounded queue."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext.checkpoint.files import ShardWriter, TensorFiles, TensorSpec
from qnext.checkpoint.write_behind import WriteBehind

TENSORS = {f"t{i}": torch.arange(7 * i + 3, dtype=torch.float32) for i in range(40)}
PLAN = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_the_same_bytes_as_without(tmp_path: Path) -> None:
    for behind in (False, True):
        folder = tmp_path / str(behind)
        folder.mkdir()
        shards = ShardWriter(folder, PLAN, max_shard_bytes=1500)
        writer = WriteBehind(shards) if behind else shards
        for name, tensor in reversed(TENSORS.items()):
            writer.write(name, tensor)
        writer.finish()
        writer.close()
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("False", "True")]
    assert files[0] == files[1] and len(files[0]) > 3
    for name in files[0]:
        assert (tmp_path / "False" / name).read_bytes() == (tmp_path / "True" / name).read_bytes()
    with TensorFiles(tmp_path / "True") as read:
        for name in TENSORS:
            read.expect(name)
        assert all(torch.equal(read.read(name), tensor) for name, tensor in TENSORS.items())


class FullDisk(ShardWriter):
    def write(self, name: str, tensor: Tensor, *, row: int | None = None) -> None:
        if name == "t3":
            raise OSError(28, "No space left on device")
        super().write(name, tensor, row=row)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    writer = WriteBehind(FullDisk(tmp_path, PLAN))
    with pytest.raises(OSError, match="No space"):
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.finish()
    writer.close()


def test_no_more_than_the_bound_waits(tmp_path: Path) -> None:
    may_go_on, begun = threading.Event(), []

    class SlowDisk(ShardWriter):
        def write(self, name: str, tensor: Tensor, *, row: int | None = None) -> None:
            begun.append(name)
            assert may_go_on.wait(60)
            super().write(name, tensor, row=row)

    big = {f"t{i}": torch.zeros(5 << 20) for i in range(5)}  # 20 MiB each: three wait, the fourth must not
    writer = WriteBehind(SlowDisk(tmp_path, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in big.items()}))
    accepted: list[str] = []

    def write_all() -> None:
        for name, tensor in big.items():
            writer.write(name, tensor)
            accepted.append(name)
        writer.finish()

    thread = threading.Thread(target=write_all)
    thread.start()
    thread.join(0.5)
    assert accepted == ["t0", "t1", "t2"] and begun == ["t0"]
    may_go_on.set()
    thread.join(60)
    assert accepted == list(big)
    writer.close()
