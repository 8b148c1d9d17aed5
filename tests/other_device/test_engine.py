"""Engines: the same tokens as on the CPU, and how often a step waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qnext.engine import SamplingParams
from qnext.model import CausalLM, initialize
from qnext.ops.backends import TORCH
from tests.engine.drafting import draft_always, make_engine, prompts_of
from tests.engine.models import tiny_model
from tests.other_device.device import OtherDevice, moved

OPTIONS: dict[str, dict[str, Any]] = {
    "drafts": {"speculation": True, "max_draft_tokens": 3},
    "pieces": {"max_num_batched_tokens": 67},
    "prefixes in host memory": {"num_blocks": 24, "host_cache_bytes": 1 << 24},
}
PARAMS = [
    SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0),
    SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.0, top_p=0.9, seed=5, logprobs=2),
    SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.7, min_p=0.05, top_k=9, repetition_penalty=1.1, seed=6),
]


def _with_drafts() -> CausalLM:
    model = CausalLM(tiny_model("hybrid").config.with_(num_nextn_predict_layers=1)).eval()
    initialize(model, seed=3)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_are_those_of_the_cpu(options: dict[str, Any], other: OtherDevice) -> None:
    """Of a first round, and of a second one that continues its prompts."""
    here = _with_drafts()
    prompts = prompts_of(here, [70, 5, 1])
    found = []
    for model in (here, moved(here)):
        engine = make_engine(model, **{"speculation": False, **options})
        if engine.drafter is not None:
            draft_always(engine)
        first = engine.generate(prompts, PARAMS)
        second = engine.generate([[*p, *a.output_ids, 8] for p, a in zip(prompts, first, strict=True)], PARAMS)
        engine.check_integrity()
        found.append([answer.output_ids for answer in (*first, *second)])
    assert found[0] == found[1]


def test_a_decoding_step_waits_once_for_its_tokens(other: OtherDevice) -> None:
    engine = make_engine(moved(tiny_model("hybrid")), speculation=False)
    for prompt, params in zip(prompts_of(tiny_model("hybrid"), [9, 20]), PARAMS[:2], strict=True):
        engine.add_request(prompt, params)
    reads = []
    while engine.has_unfinished:
        before = other.num_reads
        engine.step()
        reads.append(other.num_reads - before)
    assert len(reads) == 5 and reads[1:] == [1] * 4


def test_batches_filled_up_have_the_same_answers(other: OtherDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences and one that is nobody's: what counts experts is on the device, and nothing more is read back."""
    model = tiny_model("hybrid")
    found = []
    for pads in (False, True):
        backend = replace(TORCH, max_recorded_tokens=8, pads_recordings=pads)
        for place in ("assembly", "sizes", "execution.recorded", "execution.inputs"):
            monkeypatch.setattr(f"qnext.engine.{place}.backend_of", lambda _, backend=backend: backend)
        monkeypatch.setattr("qnext.engine.execution.recorded.record", lambda compute, device: (compute(), None))
        engine = make_engine(moved(model), speculation=False)
        requests = [
            engine.add_request(prompt, replace(params, max_tokens=3))
            for prompt, params in zip(prompts_of(model, [9, 3, 1]), PARAMS, strict=True)
        ]
        reads = []
        while engine.has_unfinished:
            before = other.num_reads
            engine.step()
            reads.append(other.num_reads - before)
        found.append(([request.output_ids for request in requests], engine.expert_load(), reads))
    assert found[0] == found[1]
