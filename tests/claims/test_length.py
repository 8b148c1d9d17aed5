"""Long prompts that are timed."""

from __future__ import annotations

import pytest

from qnext.claims.length import read_prompt
from qnext.engine import Engine, EngineConfig
from tests.engine.models import tiny_model


def test_a_step_that_breaks_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would ever come."""
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, max_model_len=64, speculation=False))

    def broken(plan: object) -> None:
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr(engine.executor, "execute", broken)
    with pytest.raises(ZeroDivisionError, match="in a kernel"):
        read_prompt(engine, 20, 4, edge=8)
