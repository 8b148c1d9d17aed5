"""An engine that keeps recurrent states in bf16: what stays the same bits, what differs and by how much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qnext.engine import Engine, EngineConfig, SamplingParams
from qnext.engine.policy.step import StepPlan
from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.ops import DELTA_CHUNK_SIZE
from qnext.planning import state_bytes_per_sequence
from tests.engine.conversations import MAX_LEN, SOME_SCHEDULES, alone, check, run_traffic
from tests.engine.executors import KeepingExecutor, local
from tests.engine.models import NATIVE, needs_native, random_prompt, reference_logits, tiny_model
from tests.model.models import PEER_CONFIGS, make_in_form, make_model
from tests.ops.compare import relative_rms

GREEDY = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
# Relative RMS of logits. One rounding to bf16 is 1e-3 of a state; after thirty in a row, which fade as slowly as their
# tokens, the state is off by up to 1e-2, a layer's output, divided by its size in the gated norm, by some times more.
# Measured up to 5.4e-2 on eight prompts.
TOLERANCE = 0.1


def rows_of(model: CausalLM, prompts: list[list[int]], params: SamplingParams, **options: object) -> list[Tensor]:
    """Logits of every chosen token, prompts served one after another by one engine."""
    engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=MAX_LEN, **options))  # type: ignore[arg-type]
    executor = KeepingExecutor(engine)
    completions = [engine.generate([prompt], params)[0] for prompt in prompts]
    return [torch.stack(executor.rows[completion.request_id]) for completion in completions]


@needs_native
@pytest.mark.parametrize(("form", "seed"), SOME_SCHEDULES)
def test_random_schedules_give_the_same_bits(form: str, seed: int) -> None:
    """In batches, from cached prompts, sent back and resumed: as alone and uncached."""
    answers, engine = run_traffic(
        make_in_form(NATIVE, form), seed=seed, num_requests=40, state_dtype=torch.bfloat16, has_turns=False
    )
    assert engine.scheduler.prefixes is not None
    assert engine.scheduler.prefixes.statistics.tokens_hit > 0
    assert local(engine)._decoding._batches, "steps are recorded as well"
    check(answers)
    for answer in answers:
        if answer.rows:
            assert torch.equal(torch.stack(answer.rows), answer.wanted_rows[: len(answer.rows)])


@needs_native
@pytest.mark.parametrize("form", ["float32", "int4-g32"])
def test_drafts_right_and_wrong_change_no_answer(form: str) -> None:
    answers, engine = run_traffic(
        make_in_form(NATIVE, form),
        seed=7,
        num_requests=40,
        max_draft_tokens=3,
        state_dtype=torch.bfloat16,
        has_turns=False,
    )
    check(answers)
    assert any(size[1] > size[0] for size in local(engine)._decoding._batches), "windows are recorded as well"


@needs_native
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_request_that_was_sent_back_keeps_its_bits(prefix_cache: bool) -> None:
    """On from its checkpoint, and without one: then its answer is computed again as a part of a prompt."""
    model = make_in_form(NATIVE, "float32")
    engine = Engine.of(
        model,
        EngineConfig(
            max_num_seqs=2,
            max_model_len=MAX_LEN,
            num_blocks=12,
            prefix_cache=prefix_cache,
            poison=True,
            state_dtype=torch.bfloat16,
        ),
    )
    executor = KeepingExecutor(engine)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = [list(range(1, 41)), list(range(2, 42))]
    completions = engine.generate(prompts, params)
    assert engine.scheduler.num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, rows = alone(model, prompt, params, 100, torch.bfloat16)
        assert list(completion.output_ids) == tokens
        assert torch.equal(torch.stack(executor.rows[completion.request_id]), rows)


@needs_native
def test_recorded_steps_give_the_bits_of_python() -> None:
    model = make_in_form(NATIVE, "int4-g32")
    prompts = [random_prompt(90, seed=1), random_prompt(5, seed=2)]
    recorded = rows_of(model, prompts, GREEDY, state_dtype=torch.bfloat16)
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    plain = rows_of(model, prompts, GREEDY, state_dtype=torch.bfloat16)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(recorded, plain, strict=True))


@needs_native
@pytest.mark.parametrize("seed", range(3))
def test_a_cached_answer_is_only_close(seed: int) -> None:
    """The next turn goes on from a state that was rounded after every token of the answer; computed anew, those tokens
    are a prompt's. In fp32 there is no difference. Without experts: at near ties others would be chosen."""
    model = make_model(replace(PEER_CONFIGS[NATIVE], num_experts=0))
    first = random_prompt(70, seed=seed)
    params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0)
    differences = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=MAX_LEN, state_dtype=dtype))
        executor = KeepingExecutor(engine)
        answer = engine.generate([first], GREEDY)[0].output_ids
        second = [*first, *answer, *random_prompt(9, seed=seed + 10)]
        completion = engine.generate([second], params)[0]
        assert completion.num_cached_tokens == 99
        (uncached,) = rows_of(model, [second], params, state_dtype=dtype, prefix_cache=False)
        differences[dtype] = relative_rms(executor.rows[completion.request_id][0], uncached[0])
    assert differences[torch.float32] == 0
    assert 0 < differences[torch.bfloat16] < TOLERANCE


@needs_native
def test_cached_prompts_end_on_the_grid() -> None:
    """There the state is rounded in any case; elsewhere a copy would have one rounding more than the uncached one."""
    model = make_in_form(NATIVE, "float32")
    prompt = random_prompt(150, seed=5)
    for dtype, cached in ((torch.float32, 149), (torch.bfloat16, 149 // DELTA_CHUNK_SIZE * DELTA_CHUNK_SIZE)):
        engine = Engine.of(model, EngineConfig(max_num_seqs=1, max_model_len=MAX_LEN, state_dtype=dtype))
        executor = KeepingExecutor(engine)
        one, other = (engine.generate([prompt], GREEDY)[0] for _ in range(2))
        assert (one.num_cached_tokens, other.num_cached_tokens) == (0, cached)
        rows = [torch.stack(executor.rows[completion.request_id]) for completion in (one, other)]
        assert torch.equal(*rows)


@pytest.mark.parametrize("kind", ["hybrid", "linear"])
def test_the_reference_rounds_little(kind: str) -> None:
    """Sizes of no native kernel. The state is rounded, and the logits show it, within bounds."""
    model = tiny_model(kind)
    prompt = random_prompt(100, seed=6)
    (rows,) = rows_of(model, [prompt], GREEDY, state_dtype=torch.bfloat16)
    tokens = [*prompt, *alone(model, prompt, GREEDY, 30, torch.bfloat16)[0]]
    wanted = reference_logits(model, tokens)[len(prompt) - 1 : -1]
    assert 1e-4 < relative_rms(rows, wanted) < TOLERANCE


def test_bytes_are_those_of_the_plan() -> None:
    model = tiny_model("hybrid")
    engine = Engine.of(
        model, EngineConfig(max_num_seqs=3, max_model_len=64, num_checkpoints=2, state_dtype=torch.bfloat16)
    )
    planned = state_bytes_per_sequence(model.config, state_dtype="bfloat16")
    wide = state_bytes_per_sequence(model.config)
    assert (planned.recurrent, planned.conv) == (wide.recurrent // 2, wide.conv)
    assert engine.memory_plan.state_bytes_per_sequence == planned.total
    assert engine.memory_plan.state_bytes == local(engine).cache.state_bytes == 5 * planned.total
    for slots in local(engine).cache.delta.values():
        assert (slots.state.dtype, slots.conv.dtype) == (torch.bfloat16, torch.float32)


def test_freed_states_are_filled_with_nan() -> None:
    engine = Engine.of(
        tiny_model("linear"),
        EngineConfig(max_num_seqs=1, max_model_len=64, prefix_cache=False, poison=True, state_dtype=torch.bfloat16),
    )
    for _ in range(2):  # the second finds NaN in its slot
        (completion,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True, seed=0))
        assert len(completion.output_ids) == 2
        state = local(engine).cache.delta[0].state
        assert state.isfinite().all()
        local(engine).cache.forget(StepPlan((), (), engine.scheduler.slots.drain_freed()))
        assert state.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"float32 or bfloat16, not in {dtype}"):
        Engine.of(tiny_model("linear"), EngineConfig(max_num_seqs=1, max_model_len=64, state_dtype=dtype))
