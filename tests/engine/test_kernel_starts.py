"""Kernels that one decoding step starts on a GPU, at the released sizes: in a graph each costs a microsecond or two."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from qnext.checkpoint.codes import Fp8Codes
from qnext.checkpoint.load import Places, empty_model
from qnext.config import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig, preset
from qnext.engine.execution.cache import Cache, CacheDtypes, CacheSizes
from qnext.engine.execution.inputs import StepInputs
from qnext.engine.policy.step import Rows, SequencePlan, StepPlan
from qnext.planning import list_parameters
from qnext.planning.parameters import QUANTIZED
from tests.engine.meta import META, TorchStarts


def starts_of_a_step(config: ModelConfig, starts: list[str], *, num_sequences: int = 1) -> Counter[str]:
    """Of a model in FP8 with bf16 beside it; each sequence gets one token."""
    infos = list_parameters(config)
    codes = {
        name: Fp8Codes(info.shape, (128, 128), torch.float32) for name, info in infos.items() if info.kind in QUANTIZED
    }
    model = empty_model(config, dtypes=torch.bfloat16, places=Places(META), quantized=codes).eval()
    sizes = CacheSizes(num_blocks=4 * num_sequences, num_slots=num_sequences, max_model_len=64)
    cache = Cache(config, sizes, CacheDtypes(activations=torch.bfloat16, kv=torch.bfloat16), device=META)
    plans = [SequencePlan(str(n), n, (1,), 20, needs_sample=True, blocks=(4 * n,)) for n in range(num_sequences)]
    cache.prepare(StepPlan(tuple(plans)))
    inputs = StepInputs(cache, [1] * num_sequences)
    inputs.fill([Rows(n, (3,), 20) for n in range(num_sequences)])
    for _ in range(2):  # the first meets what is made once
        starts.clear()
        with torch.inference_mode(), TorchStarts(starts):
            model.logits(model(inputs.batch).hidden_TD)
    return Counter(starts)


@pytest.mark.parametrize("num_sequences", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_step_of_few_sequences_starts_few_kernels(starts: list[str], num_sequences: int) -> None:
    """Six in a layer of Gated DeltaNet, eight in one of attention; the rest once in a step."""
    config = replace(preset("80b-a3b"), num_nextn_predict_layers=0)
    found = starts_of_a_step(config, starts, num_sequences=num_sequences)
    linear, full = (config.layer_types.count(kind) for kind in (LINEAR_ATTENTION, FULL_ATTENTION))
    assert found == Counter(
        {
            "normed_linears_kernel": linear + full,  # what a mixer reads
            "delta_step_kernel": linear,
            "attention_heads_kernel": full,
            "paged_attention_kernel": full,
            "attention_output_kernel": full,
            "linear_codes_kernel": linear + full,  # what a mixer gives, added to the residual
            "normed_route_kernel": linear + full,
            "experts_inner_kernel": linear + full,
            "experts_output_kernel": linear + full,
            **dict.fromkeys(("aten.embedding.default", "aten.index_select.default", "rope_kernel"), 1),
            **dict.fromkeys(("rms_norm_kernel", "aten.linear.default"), 1),  # before the head, and the head
        }
    )
    assert found.total() == 317


def test_so_does_one_of_many_sequences(starts: list[str]) -> None:
    """No matrix of codes is made numbers again; experts are sorted by operations of PyTorch."""
    config = replace(preset("80b-a3b"), num_nextn_predict_layers=0)
    found = starts_of_a_step(config.with_layers(4), starts, num_sequences=256)
    assert found["aten.linear.default"] == 1 + 2 * 4  # the head; of layers the router and a vector
    assert found.total() == 131
