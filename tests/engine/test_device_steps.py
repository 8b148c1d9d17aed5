"""Steps of an engine whose cache is on a device: nothing of them reads on the host what the device computes.

The meta device stands for a GPU. It has no numbers, so whatever asks for one raises; and it does not mix with the CPU.
"""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qnext.engine.execution.cache import Cache, CacheDtypes, CacheSizes
from qnext.engine.execution.expert_load import ExpertCounter
from qnext.engine.execution.inputs import MixedInputs, StepInputs
from qnext.engine.execution.local import LocalExecutor
from qnext.engine.policy.step import Rows, SequencePlan, StepPlan
from qnext.model import CausalLM
from qnext.model.moe import Experts
from qnext.ops import backends, empty_fp8
from qnext.ops.cuda_graph import CapturedGraph, HostTraffic
from tests.engine.meta import META
from tests.engine.models import tiny_model


def cache_of(model: CausalLM, device: torch.device, *, drafts: int = 0) -> Cache:
    sizes = CacheSizes(num_blocks=12, num_slots=3, max_model_len=64, num_draft_tokens=drafts and drafts + 1)
    cache = Cache(model.config, sizes, CacheDtypes(activations=torch.float32, kv=torch.float32), device=device)
    sequences = [
        SequencePlan(str(slot), slot, (1,), 20, needs_sample=True, blocks=tuple(range(4 * slot, 4 * slot + 4)))
        for slot in range(3)
    ]
    cache.prepare(StepPlan(tuple(sequences)))
    return cache


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_decoding_step_needs_no_number_on_the_host(starts: list[str], drafts: int) -> None:
    """So a graph can hold it: after the inputs were sent, nothing crosses between host and device."""
    model = copy.deepcopy(tiny_model("hybrid")).to(META)
    cache = cache_of(model, META, drafts=drafts)
    inputs = StepInputs(cache, [1 + drafts, 1])
    assert backends.backend_of(META).can_record
    for token in (3, 4):
        inputs.fill([Rows(2, (token, 5, 6)[: 1 + drafts], 20, drafts > 0), Rows(0, (token,), 33)])
        with torch.inference_mode(), HostTraffic() as witness:
            logits_TY = model.logits(model(inputs.batch).hidden_TD)
        assert logits_TY.shape == (2 + drafts, model.config.vocab_size)
    assert witness.first is None
    assert {"paged_attention_kernel", "delta_step_kernel", "experts_output_kernel", "normed_route_kernel"} <= set(
        starts
    )


@pytest.mark.parametrize("form", ["bfloat16", "fp8"])
def test_so_does_one_of_many_sequences(starts: list[str], form: str) -> None:
    """With more tokens than the kernel for few takes: rows are sorted by expert."""
    model = copy.deepcopy(tiny_model("hybrid")).to(META, torch.bfloat16)
    if form == "fp8":
        for module in [module for module in model.modules() if isinstance(module, Experts)]:
            for name, matrices in list(module.named_parameters(recurse=False)):
                codes = empty_fp8(tuple(matrices.shape), block=(32, 32), scale_dtype=torch.float32, device=META)
                module.set_weight(name, codes)
    cache = cache_of(model, META)
    inputs = StepInputs(cache, [1] * 12)
    inputs.fill([Rows(n % 3, (n,), 20 + n) for n in range(12)])
    for _ in range(2):  # the first meets what is made once
        with torch.inference_mode(), HostTraffic() as witness:
            model.logits(model(inputs.batch).hidden_TD)
    assert witness.first is None
    assert ("grouped_codes_kernel" in starts) == (form == "fp8")


def test_a_step_with_prompts_runs_on_a_device(starts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, one beside it, and a sequence that decodes, whose part is recorded and repeated."""
    model = copy.deepcopy(tiny_model("hybrid")).to(META, torch.bfloat16)
    executor = LocalExecutor(model, cache_of(model, META))
    prompts = [
        SequencePlan("0", 0, tuple(range(3, 40)), 24, needs_sample=True),
        SequencePlan("1", 1, (3, 4, 5), 24, needs_sample=True),
        SequencePlan("2", 2, (6,), 24, needs_sample=True),
    ]
    replays: list[int] = []
    graph = CapturedGraph(SimpleNamespace(replay=lambda: replays.append(1)), 0)
    monkeypatch.setattr("qnext.engine.execution.recorded.record", lambda compute, device: (compute(), graph))
    output = executor.execute(StepPlan(tuple(prompts)))
    assert output.logits_RY.device == META and output.logits_RY.shape == (3, model.config.vocab_size)
    assert output.logits_RY.dtype == torch.float32 and output.order == (2, 0, 1) and not replays
    later = [SequencePlan(str(slot), slot, (slot,), (61, 27, 25)[slot], needs_sample=True) for slot in (1, 2)]
    executor.execute(StepPlan((later[1], prompts[0]._replace(start=4))))
    assert replays == [1] and [size[:3] for size in executor._decoding._batches] == [(1, 1, 1)]
    assert executor.execute(StepPlan(tuple(later))).logits_RY.dtype == torch.float32
    assert {"delta_chunks_kernel", "delta_step_kernel", "paged_attention_kernel"} <= set(starts)


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_is_sent_is_what_the_cpu_reads(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    """Both sides of the mirrors, for batches whose rows of a sequence change."""
    model = tiny_model("hybrid")
    here, there = cache_of(model, torch.device("cpu"), drafts=drafts), cache_of(model, META, drafts=drafts)
    for kind in (StepInputs, MixedInputs):
        for rows in ([Rows(2, (7, 8), 20, drafts > 0), Rows(1, (9,), 41)], [Rows(0, (7,), 3), Rows(1, (8, 9), 17)]):
            of_here, of_there = (
                StepInputs(cache, [2, 1]) if kind is StepInputs else MixedInputs(cache, rows) for cache in (here, there)
            )
            of_here.fill(rows)
            of_there.fill(rows)
            for ours, theirs in zip(of_here._mirrors, of_there._mirrors, strict=False):
                assert np.array_equal(ours.host, theirs.host)
            assert of_here.batch.packing.cu_seqlens.tolist() == of_there._starts.host.tolist()
            view = of_there.batch.cache
            assert view is not None and view.block_tables_NM.device == META
            # A recorded step goes on with other lengths, so nothing may be planned with those of the host.
            lengths = None if kind is StepInputs else tuple(part.start + len(part.token_ids) for part in rows)
            assert view.attention_cache(next(iter(view.kv))).host_lengths == lengths
    assert np.array_equal(here.tables(), there.tables())


def test_rows_that_are_nobody_s_need_no_number_on_the_host(starts: list[str]) -> None:
    model = copy.deepcopy(tiny_model("hybrid")).to(META)
    sizes = CacheSizes(num_blocks=12, num_slots=3, max_model_len=64, has_spare=True)
    dtypes = CacheDtypes(activations=torch.float32, kv=torch.float32)
    loads = ExpertCounter(model.config, META).of_layer
    cache = Cache(model.config, sizes, dtypes, device=META, expert_load=loads)
    inputs = StepInputs(cache, [1] * 4)
    inputs.fill([*(Rows(slot, (slot,), 0) for slot in range(3)), *cache.rows_of_nobody([1])])
    for _ in range(2):  # the first meets what is made once
        with torch.inference_mode(), HostTraffic() as witness:
            assert model.logits(model(inputs.batch).hidden_TD).shape[0] == 4
    assert witness.first is None and inputs._is_counted is not None
    assert inputs._is_counted.host.reshape(4, -1).all(1).tolist() == [True, True, True, False]
    assert inputs._of_sequences.host[0, 3] == 3 and inputs._of_tokens.host[2, 3] == 12 * cache.block_size


def test_a_witness_names_what_needs_the_host() -> None:
    x = torch.zeros(3, device=META)
    for crossing in (lambda: torch.ones(3).to(META), lambda: x.nonzero(), lambda: x.copy_(torch.ones(3))):
        with HostTraffic() as witness, contextlib.suppress(NotImplementedError):
            crossing()
        assert witness.first is not None
    with HostTraffic() as witness:
        x.mul_(2).add_(torch.tensor(1.0))
    assert witness.first is None
