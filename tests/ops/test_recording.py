"""A recording gives what the computation would give now, and says when it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from qnext import ops
from qnext.ops import backends

pytestmark = pytest.mark.skipif(backends.cpu_kernels() is None, reason="the native kernels are not built or not wanted")

SIZE = 64
CPU = torch.device("cpu")


class Stack:
    """Some layers of native operations alone, on one input."""

    def __init__(self, *, num_layers: int = 6, dtype: torch.dtype = torch.float32) -> None:
        self.norm = nn.Parameter(torch.linspace(-1, 1, SIZE).to(dtype))
        self.weights = [nn.Parameter(torch.randn(SIZE, SIZE).to(dtype)) for _ in range(num_layers)]
        self.x = torch.randn(3, SIZE)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.norm, *self.weights]

    @torch.no_grad()
    def compute(self) -> Tensor:
        x = self.x
        for weight in self.weights:
            normed = ops.rms_norm(x.view(3, SIZE), self.norm, eps=1e-6, zero_centered=True)
            gate = ops.linear(normed, weight)
            x = ops.add(x, ops.swiglu(gate, normed))
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_is_the_computation_on_new_input(dtype: torch.dtype) -> None:
    stack = Stack(dtype=dtype)
    stack.compute()  # conversions that are made once
    out, recording = ops.record(stack.compute, CPU)
    assert recording is not None
    assert torch.equal(out, stack.compute())
    for seed in range(3):
        stack.x.copy_(torch.randn(3, SIZE, generator=torch.Generator().manual_seed(seed)))
        wanted = stack.compute()
        assert not torch.equal(out, wanted)
        recording.replay()
        assert torch.equal(out, wanted)


def test_memory_of_dead_tensors_is_used_again() -> None:
    """However many layers: the result, and what is alive within one of them."""
    sizes = []
    for num_layers in (4, 8):
        _, recording = ops.record(Stack(num_layers=num_layers).compute, CPU)
        assert recording is not None
        sizes.append(recording.num_bytes)
    assert sizes[0] == sizes[1] <= 6 * 3 * SIZE * 4


def test_a_view_keeps_the_memory_of_its_tensor() -> None:
    x = torch.randn(2, SIZE)

    def compute() -> tuple[Tensor, Tensor]:
        first = ops.add(x, x).view(2, 4, 16)[1]
        return first, ops.add(x, ops.add(x, x))

    with torch.no_grad():
        (first, second), recording = ops.record(compute, CPU)
        assert recording is not None
        recording.replay()
    assert torch.equal(first.flatten(), 2 * x[1])
    assert torch.equal(second, x + 2 * x)


@pytest.mark.parametrize(
    "compute", [lambda x: x + 1, lambda x: ops.add(x, x).sum(), lambda x: x.mul_(2), lambda x: x.double(), torch.clone]
)
def test_what_torch_computes_is_not_recorded(compute: object) -> None:
    x = torch.randn(2, SIZE)
    copy = x.clone()
    with torch.no_grad():
        out, recording = ops.record(lambda: compute(x), CPU)  # type: ignore[operator]
        assert recording is None
        assert torch.equal(out, compute(copy))  # type: ignore[operator]


def test_changes_of_parameters_are_counted() -> None:
    stack = Stack()
    watch = ops.ParameterWatch(stack.parameters)
    assert watch.num_changes() == 0
    for count, change in enumerate((lambda p: p.mul_(2), lambda p: setattr(p, "data", p.data.clone())), start=1):
        with torch.no_grad():
            change(stack.weights[-1])
        assert watch.num_changes() == watch.num_changes() == count


def test_recording_does_not_import_a_compiler() -> None:
    code = (
        "import sys, torch; from qnext import ops; x = torch.ones(2, 64); "
        "_, recording = torch.no_grad()(ops.record)(lambda: ops.add(x, x), x.device); recording.replay(); "
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_of_a_replay_and_after_it() -> None:
    table, tokens = torch.randn(5, SIZE), torch.tensor([4, 0])
    with torch.no_grad():
        out, recording = ops.record(lambda: ops.embedding(tokens, table), CPU)
        assert recording is not None
        tokens[1] = 5
        with pytest.raises(IndexError, match="token 5 lies outside of 0 to 4"):
            recording.replay()
        tokens[1] = 3
        recording.replay()
        assert torch.equal(out, table[[4, 3]])
        with pytest.raises(ZeroDivisionError):
            ops.record(lambda: 1 / 0, CPU)
        assert ops.record(lambda: ops.add(table, table), CPU)[1] is not None
