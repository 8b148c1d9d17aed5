"""What an engine allocates is what its options and its memory plan say."""

from __future__ import annotations

import pytest
import torch

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.errors import UsageError
from qnext.planning import kv_bytes_per_token, state_bytes_per_sequence
from tests.engine.executors import KeepingExecutor
from tests.engine.models import KINDS, random_prompt, reference_logits, tiny_model

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_plan_counts_what_is_allocated(kind: str) -> None:
    model = tiny_model(kind)
    config = model.config
    assert Engine.of(model, EngineConfig(max_num_seqs=3, num_blocks=15, num_checkpoints=4)).memory_plan.num_slots == (
        7 if config.num_linear_layers else 3
    )
    engine = Engine.of(model, EngineConfig(max_num_seqs=3, max_model_len=100, num_blocks=15, prefix_cache=False))
    plan = engine.memory_plan
    kv_per_token = config.num_full_layers * 2 * 2 * 32 * 4
    state = config.num_linear_layers * (3 * (2 * 32 + 192) + 6 * 16 * 32) * 4
    assert kv_per_token == kv_bytes_per_token(config, dtype="float32")
    assert state == state_bytes_per_sequence(config).total
    assert plan.kv_bytes == 15 * 16 * kv_per_token
    assert plan.kv_bytes_per_1000_tokens == 1000 * kv_per_token
    assert (plan.state_bytes_per_sequence, plan.state_bytes) == (state, 3 * state)
    assert plan.num_full_sequences == (2 if config.num_full_layers else 3)
    assert plan.weight_bytes >= 4 * sum(p.numel() for p in model.parameters())
    assert len(plan.describe().splitlines()) == 2


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_keys_and_values_have_a_dtype_of_their_own(kv_dtype: torch.dtype) -> None:
    model, prompt = tiny_model("full"), random_prompt(40, seed=0)
    engine = Engine.of(model, EngineConfig(max_num_seqs=2, num_blocks=8, kv_dtype=kv_dtype, poison=True))
    executor = KeepingExecutor(engine)
    (done,) = engine.generate([prompt], GREEDY)
    expected = reference_logits(model, [*prompt, *done.output_ids[:-1]])[len(prompt) - 1 :]
    # Keys and values are rounded to 8 bits or 7.
    assert (torch.stack(executor.rows[done.request_id]) - expected).norm() < 0.05 * expected.norm()
    name = str(kv_dtype).removeprefix("torch.")
    assert engine.memory_plan.kv_bytes == 8 * 16 * kv_bytes_per_token(model.config, dtype=name)


def test_a_cache_smaller_than_the_context_bounds_it() -> None:
    engine = Engine.of(tiny_model("hybrid"), EngineConfig(max_num_seqs=1, num_blocks=4))
    assert engine.max_model_len == engine.memory_plan.max_model_len == 64
    (done,) = engine.generate([[1] * 60], SamplingParams(ignore_eos=True))
    assert len(done.output_ids) == 4


def test_kv_budget_is_kept() -> None:
    engine = Engine.of(tiny_model("full"), EngineConfig(max_num_seqs=4, kv_budget_bytes=160_000))
    assert 160_000 - 16 * 1024 < engine.memory_plan.kv_bytes <= 160_000
    with pytest.raises(UsageError, match="at least one block"):
        Engine.of(tiny_model("full"), EngineConfig(kv_budget_bytes=10))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 7}, "starve"),
        ({"max_model_len": 513}, "512"),
        ({"num_blocks": 3, "kv_budget_bytes": 3}, "not both"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.of(tiny_model("hybrid"), EngineConfig(**sizes))
