"""Which device a model goes to: what is asked for, what is there, and what fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qnext.checkpoint import load_model
from qnext.errors import DoesNotFit, NotSupported, UsageError
from qnext.model import held_bytes
from qnext.ops import backends
from qnext.planning.plan import check_weights
from qnext.session.folder import load_weights, open_model, place_model, weight_bytes_on
from qnext.session.placement import Wanted, check_device, choose_device, device_of_rank, kind_on_ranks
from qnext.session.rank_options import Launched, RankOptions
from tests.checkpoint.float_folders import float_folder, float_forms
from tests.checkpoint.folders import tiny_folder

GPU = torch.device("cuda", 0)


def bytes_of(count: int) -> Callable[[torch.device], int]:
    return lambda device: count


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells of a machine with two, each with 1,000 bytes, of which torch keeps 100 that were freed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:12345"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device {name}: must be auto, cpu, cuda or cuda:N"):
        check_device(name)


def test_a_device_that_is_not_there(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device("cuda:1")
    with pytest.raises(UsageError, match="--device cuda:2: there are 2 CUDA devices, the last is cuda:1"):
        check_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: torch finds no CUDA device here"):
        check_device("cuda")


def test_auto_takes_a_gpu_where_the_weights_fit(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(Wanted("auto", bytes_of(1000))) == GPU
    assert choose_device(Wanted("auto", bytes_of(1001))) == torch.device("cpu")
    assert choose_device(Wanted("auto", bytes_of(10), streams_experts=True)) == torch.device("cpu")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "cpu")
    assert choose_device(Wanted("auto", bytes_of(10))) == torch.device("cpu")
    monkeypatch.setenv(backends.BACKEND_VARIABLE, "torch")
    assert choose_device(Wanted("auto", bytes_of(10))) == GPU


def test_what_is_asked_for_is_taken_or_refused(two_gpus: None) -> None:
    assert choose_device(Wanted("cuda:1", bytes_of(5000))) == torch.device("cuda", 1)
    assert choose_device(Wanted("cuda", bytes_of(5000))) == GPU
    assert choose_device(Wanted("cpu", bytes_of(1))) == torch.device("cpu")
    assert choose_device(Wanted("cuda", bytes_of(5000), streams_experts=True)) == GPU
    with pytest.raises(NotSupported, match="--expert-memory: on ranks experts wait on disk for the CPU"):
        kind_on_ranks(Wanted("cuda", bytes_of(1), streams_experts=True), num_local=2)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    folder = open_model(str(tiny_folder(tmp_path / "m")), device="cuda:1")
    with pytest.raises(DoesNotFit, match=r"but 1000 B of the memory of cuda:1 are free; `qnext quantize"):
        load_weights(folder)
    check_weights("m", 1000, free_bytes=1000, device="cuda:1")
    folder = open_model(str(tiny_folder(tmp_path / "m")), expert_memory=900, device="cuda:1")
    with pytest.raises(DoesNotFit, match=r"but 1000 B of the memory of cuda:1 are free; lower --expert-memory"):
        load_weights(folder)


def test_ranks_take_a_device_each(two_gpus: None, tmp_path: Path) -> None:
    assert kind_on_ranks(Wanted("auto", bytes_of(0)), num_local=2) == "cuda"
    assert kind_on_ranks(Wanted("auto", bytes_of(0)), num_local=3) == "cpu"
    assert kind_on_ranks(Wanted("auto", bytes_of(0), streams_experts=True), num_local=2) == "cpu"
    assert kind_on_ranks(Wanted("cpu", bytes_of(0)), num_local=2) == "cpu"
    for name, num_local, line in (
        ("cuda", 3, "--device cuda: 3 ranks on this machine, but 2 CUDA devices"),
        ("cuda:1", 2, "--device cuda:1: each rank takes the CUDA device of its own number"),
    ):
        with pytest.raises(UsageError, match=line):
            kind_on_ranks(Wanted(name, bytes_of(0)), num_local=num_local)
    assert device_of_rank("cuda", 1) == torch.device("cuda", 1) and device_of_rank("cpu", 1) == torch.device("cpu")
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    launched = Launched.found_in({**environment, "MASTER_ADDR": "h", "MASTER_PORT": "1"})
    assert RankOptions(tensor_parallel=8, launched=launched).local_rank(5) == 1
    folder = open_model(str(tiny_folder(tmp_path / "m")), device="auto")
    assert place_model(folder, ranks=RankOptions(tensor_parallel=2)) == GPU and folder.device == "cuda"


def test_a_model_without_a_gpu_stays_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = open_model(str(tiny_folder(tmp_path / "m")), device="auto")
    assert place_model(folder) == torch.device("cpu") and folder.device == "cpu"
    assert load_model(folder.path).device == torch.device("cpu")


@pytest.mark.parametrize(("name", "is_kept"), [("official", True), ("FP8-dynamic", False), ("NVFP4", False)])
def test_floats_of_few_bits_count_as_what_they_become(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_kept: bool
) -> None:
    """On the CPU bfloat16, so that weights are not read that do not fit; FP8 with blocks stays FP8 on a GPU."""
    packed = float_folder(tmp_path / "m", float_forms()[name])
    folder = open_model(str(tmp_path / "m"), device="cpu")
    numbers = sum(weight.numel() for weight in packed.values())
    monkeypatch.setattr("qnext.ops.reads_fp8", lambda device: device.type == "cuda")
    here, there = (weight_bytes_on(folder, None, device) for device in (torch.device("cpu"), GPU))
    assert here - folder.stored_bytes == numbers * (12 if name == "NVFP4" else 8) // 8
    assert there == (folder.stored_bytes if is_kept else here)
    loaded = held_bytes(load_model(tmp_path / "m"))
    assert loaded <= here < 1.2 * loaded
