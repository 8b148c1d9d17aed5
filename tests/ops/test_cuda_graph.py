"""Captured graphs, with a small stand-in of torch's graphs on the CPU, and with the true ones where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import cuda_graph

DEVICE = torch.device("cuda", 0)


class FakeStream:
    """Notes on which stream what is done, and who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    """Runs the captured computation again where it was captured. While it is captured, numbers do not change."""

    def __init__(self) -> None:
        self.replayed: Callable[[], None] = lambda: None

    def replay(self) -> None:
        self.replayed()


class FakeCuda:
    """What `capture` needs of torch.cuda. A computation puts its result where `place` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.is_capturing = False
        self.refusal: str | None = None
        self.pools: list[object] = []
        main = FakeStream("main", self.log)
        monkeypatch.setattr(cuda_graph, "_workshop", lambda device: cuda_graph._Workshop(self._side, "pool"))
        self._side: Any = FakeStream("side", self.log)
        fakes = {
            "current_stream": lambda device: main,
            "stream": self._on,
            "CUDAGraph": FakeGraph,
            "graph": self._capture,
            "memory_allocated": lambda device: 100 * len(self.pools),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def _on(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield

    @contextmanager
    def _capture(
        self, graph: FakeGraph, *, pool: object, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        assert (stream.name, capture_error_mode) == ("side", "thread_local")
        self.pools.append(pool)
        self.is_capturing = True
        try:
            if self.refusal is not None:
                raise RuntimeError(self.refusal)
            yield
        finally:
            self.is_capturing = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_a_computation_runs_once_and_its_graph_writes_where_it_was_captured(cuda: FakeCuda) -> None:
    state, runs = torch.zeros(3), []

    @torch.inference_mode()
    def compute() -> Tensor:
        runs.append(cuda.is_capturing)
        return torch.full((3,), float("nan")) if cuda.is_capturing else state.add_(1).clone()

    result, recording = ops.record(compute, DEVICE)
    assert runs == [False, True] and recording is not None
    assert state.tolist() == [1, 1, 1] == result.tolist()  # the capture computes nothing: its place gets the numbers
    assert cuda.log == ["side waits for main", "on side", "main waits for side"]
    assert cuda.pools == ["pool"] and recording.num_bytes == 100
    replays: list[int] = []
    recording.graph.replayed = lambda: replays.append(1)  # type: ignore[attr-defined]
    recording.replay()
    assert replays == [1]


def test_a_result_that_stays_where_it_is_is_left_alone(cuda: FakeCuda) -> None:
    place = torch.tensor([4.0])
    result, recording = ops.record(lambda: place, DEVICE)
    assert result is place and recording is not None and place.item() == 4


def test_what_needs_the_host_is_not_captured(cuda: FakeCuda) -> None:
    x = torch.arange(3.0)
    for compute in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: torch.empty_like(x, device="meta").copy_(x)):
        result, recording = ops.record(compute, DEVICE)
        assert result is not None and recording is None
    assert cuda.pools == []


def test_a_refused_capture_leaves_the_result(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    cuda.refusal = "CUDA error: operation not permitted when stream is capturing\nmore"
    result, recording = ops.record(lambda: torch.ones(2), DEVICE)
    assert result.tolist() == [1, 1] and recording is None
    assert "a step cannot be captured as a CUDA graph: CUDA error: operation not permitted" in caplog.text
    assert "more" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_graph_repeats_a_step_on_a_gpu() -> None:
    """On new input, with a state that each run changes: bit for bit the computation without a graph."""
    x, state = torch.randn(4, 64, device=DEVICE), torch.zeros(4, 64, device=DEVICE)
    weight = torch.randn(64, 64, device=DEVICE)

    def compute() -> Tensor:
        return (x @ weight + state.add_(x)).softmax(-1)

    results, recording = [], None
    for seed in range(5):
        x.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)))
        if recording is None:
            result, recording = ops.record(compute, DEVICE)
            assert recording is not None
        else:
            recording.replay()
        results.append(result.clone())
    state.zero_()
    for seed, found in enumerate(results):
        x.copy_(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(compute(), found)
