"""The loops that find the machine's limits do what they are timed for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qnext.ops.backends import cpu_kernels
from qnext.ops.limits import ARITHMETIC, peak_arithmetic, read_bandwidth

native = cpu_kernels()


@pytest.fixture(params=range(native.best_isa() + 1 if native else 0))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.force_isa(request.param)
    yield native.isa()
    native.force_isa(native.best_isa())


def test_every_byte_is_read(isa: str) -> None:
    """The result is the exclusive or of all 8-byte words, so no load can have been left out."""
    words = torch.randint(-(2**62), 2**62, (3 << 17,), generator=torch.Generator().manual_seed(1))
    expected = 0
    for word in words.tolist():
        expected ^= word
    assert native.read_all(words.data_ptr(), words.nbytes) == expected % 2**64


def test_operations_are_counted_and_cannot_be_skipped(isa: str) -> None:
    """Ten times the rounds are ten times the operations, and take longer: the compiler did not drop the loop."""
    for kind, name in enumerate(ARITHMETIC):
        few, many = native.multiply(kind, 100), native.multiply(kind, 1000)
        assert many == 10 * few
        assert (few > 0) == (name != "bfloat16" or isa in ("avx512_bf16", "avx512_amx"))


def test_limits_are_plausible() -> None:
    """A core from this century reads more than 0.1 GB/s and less than 10 TB/s; likewise operations."""
    assert 1e8 < read_bandwidth(num_bytes=8 << 20, passes=2) < 1e13
    peaks = peak_arithmetic(seconds=0.01, passes=2)
    assert set(peaks) == set(ARITHMETIC)
    assert all(value is None or 1e7 < value < 1e16 for value in peaks.values())
    assert peaks["float32"] is not None


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnext.ops.limits.cpu_kernels", lambda: None)
    assert read_bandwidth(num_bytes=1 << 20, passes=1) > 0
    peaks = peak_arithmetic(passes=1)
    assert peaks["float32"] and peaks["bfloat16"] and peaks["int8"] is None
