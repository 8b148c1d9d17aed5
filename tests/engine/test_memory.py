"""The memory plan: what is promised at the start is what is taken, and it fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.execution.recorded import largest_recordings
from qnext.errors import DoesNotFit
from qnext.model import CausalLM, initialize
from qnext.ops import backend_of
from qnext.planning import machine, recorded_bytes
from tests.engine.executors import local

from . import worst_steps
from .models import random_prompt, tiny_model

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
HAS_KERNELS = backend_of(torch.device("cpu")).name == "cpu"


def run_program(*arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks glibc")
@pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("hidden", "experts", "dtype"), [(512, 8, "float32"), pytest.param(512, 0, "bfloat16", marks=pytest.mark.slow)]
)
def test_worst_steps_stay_below_the_plan(hidden: int, experts: int, dtype: str, backend: str) -> None:
    """A long prompt with log-probabilities in the largest steps, then recorded and sampled ones."""
    if backend == "cpu" and not HAS_KERNELS:
        pytest.skip("native kernels were not built")
    options = {
        "config": {"hidden": hidden, "experts": experts, "vocab": 32768, "context": 1200},
        "dtype": dtype,
        "engine": {"max_num_seqs": 3, "max_num_batched_tokens": 1024, "num_blocks": 225},
    }
    found = run_program("-m", "tests.engine.worst_steps", json.dumps(options), QNEXT_BACKEND=backend)
    assert 20 * MIB < found["steps"] < found["workspace"]
    assert found["workspace"] < 24 * MIB + 16 * found["steps"], "the bound is of no use"
    # Caches have their memory from the start.
    assert found["caches"] <= found["made"] < found["caches"] + 8 * MIB


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: available)


@pytest.mark.skipif(not HAS_KERNELS, reason="the bound of the reference is coarser than these sizes")
def test_sizes_that_nobody_gave_shrink_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("hybrid")
    plans = []
    for available in (1000, 56, 53):
        with_memory(monkeypatch, available * MIB)
        engine = Engine.of(model, EngineConfig(max_num_seqs=64, max_model_len=512))
        plans.append(engine.memory_plan)
        assert plans[-1].total_bytes - plans[-1].weight_bytes <= available * MIB
        (done,) = engine.generate([random_prompt(100, seed=0)], SamplingParams(max_tokens=3))
        assert done.output_ids
    assert plans[0].workspace_bytes > plans[-1].workspace_bytes


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_blocks": 10_000_000}, "num_blocks"),
        ({"kv_budget_bytes": 90 * MIB, "max_num_seqs": 10_000}, "kv_budget_bytes"),
        ({"max_num_batched_tokens": 1_000_000}, "max_num_batched_tokens"),
        ({"num_checkpoints": 1_000_000}, "num_checkpoints"),
    ],
)
def test_sizes_that_do_not_fit_are_named(given: dict[str, int], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 100 * MIB)
    with pytest.raises(DoesNotFit, match=named) as error:
        Engine.of(tiny_model("hybrid"), EngineConfig(**given))
    message = str(error.value)
    assert "100.0 MiB of memory are free" in message and "\n" not in message and "lower" in message


def test_recordings_are_the_largest_that_can_be_kept() -> None:
    assert largest_recordings(3, 0, max_tokens=64) == [3, 2, 1]
    assert largest_recordings(2, 2, max_tokens=64) == [6, 5, 4, 3, 3, 2, 2, 1]
    many = largest_recordings(64, 4, max_tokens=64)
    assert len(many) == 24 and max(many) == 64
    assert largest_recordings(64, 4, max_tokens=0) == []


@pytest.mark.skipif(not HAS_KERNELS, reason="native kernels alone are recorded")
@pytest.mark.parametrize("experts", [0, 8])
def test_recorded_steps_take_what_is_planned_for_them(experts: int) -> None:
    model = CausalLM(worst_steps.config(hidden=256, experts=experts, vocab=512, context=128)).eval()
    initialize(model, seed=0)
    engine = Engine.of(model, EngineConfig(max_num_seqs=3, max_model_len=64))
    engine.generate([[5], [6, 7], [8]], SamplingParams(max_tokens=6, ignore_eos=True))
    recorded = local(engine)._decoding._batches
    assert recorded
    for (_, num_tokens, *_), kept in recorded.items():
        assert 0 < kept.recording.num_bytes <= recorded_bytes(model.config, num_tokens)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("num_tokens", [20_000, pytest.param(262_144, marks=pytest.mark.slow)])
def test_a_long_prompt_stays_within_the_plan(num_tokens: int) -> None:
    if not HAS_KERNELS:
        pytest.skip("native kernels were not built")
    found = run_program("benchmarks/bench_long_context.py", "--tokens", str(num_tokens), "--decode", "8")
    assert found["prompt_tokens"] == num_tokens and found["decode_tokens_per_second"] > 0
    assert found["cache_bytes"] < found["grown_bytes"] < found["planned_bytes"]
