"""Rates of experts that are measured for a plan."""

from __future__ import annotations

import pytest
import torch

from qnext.ops import expert_rates
from qnext.ops.expert_rates import KernelRates


def rates(monkeypatch: pytest.MonkeyPatch, *, is_quantized: bool, num_bytes: int = 1 << 20) -> tuple[KernelRates, list]:  # type: ignore[type-arg]
    """With products that take a millisecond of a clock of their own, and what they were given."""
    calls: list[tuple[torch.Size, torch.Tensor]] = []

    def product(gate_up, down, experts_TA):  # type: ignore[no-untyped-def]
        calls.append((gate_up.shape, experts_TA))
        return 0.001

    monkeypatch.setattr(expert_rates, "_seconds", product)
    found = expert_rates.expert_rates(hidden_size=64, width=32, top_k=4, is_quantized=is_quantized, num_bytes=num_bytes)
    return found, calls


@pytest.mark.parametrize(("is_quantized", "each"), [(True, 3 * 64 * 32 * 9 // 16), (False, 3 * 64 * 32 * 2)])
def test_rates_are_of_what_was_computed(monkeypatch: pytest.MonkeyPatch, is_quantized: bool, each: int) -> None:
    found, calls = rates(monkeypatch, is_quantized=is_quantized)
    assert found.memory == pytest.approx(4 * each / 0.001)
    shape, many_TA = calls[-1]
    assert shape == ((1 << 20) // each, 64, 64)
    assert found.arithmetic == pytest.approx(2 * many_TA.numel() * 3 * 64 * 32 / 0.001)
    assert many_TA.flatten().bincount().tolist() == [40] * 32


def test_tokens_come_to_experts_that_are_in_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a token are different ones, and none comes again before all others have."""
    _, calls = rates(monkeypatch, is_quantized=True)
    used = torch.cat([experts_TA.flatten() for _, experts_TA in calls if len(experts_TA) == 1]).tolist()
    assert used == [number % calls[0][0][0] for number in range(len(used))]


@pytest.mark.parametrize("is_quantized", [True, False])
def test_kernels_are_timed(is_quantized: bool) -> None:
    found = expert_rates.expert_rates(hidden_size=64, width=48, top_k=4, is_quantized=is_quantized, num_bytes=1 << 20)
    assert 1e5 < found.memory < 1e13 and 1e6 < found.arithmetic < 1e15
