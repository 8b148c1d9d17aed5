"""An engine on a GPU: its answers are those of the reference on the CPU, with and without graphs.

Without a GPU the same tests run on the CPU, where they compare recorded steps with plain ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from qnext.engine import Completion, Engine, EngineConfig, SamplingParams
from qnext.engine.sampling.sampler import Window, verify
from qnext.model import CausalLM
from tests.engine.models import random_prompt, reference_logits, tiny_model
from tests.engine.sampling import logits, request
from tests.model.models import make_in_form

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])]
PROMPTS = [random_prompt(length, seed=length) for length in (3, 9, 40)]
# Logarithms of probabilities in fp32, through four layers: sums in another order, and exponentials to 2e-7 on a GPU.
TOLERANCE = 1e-3


@cache
def model_on(device: str) -> CausalLM:
    return copy.deepcopy(tiny_model("hybrid")).to(device)


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def answers(model: CausalLM, params: SamplingParams, engines: list[Engine], *, records: bool) -> list[Completion]:
    config = EngineConfig(max_num_seqs=3, max_model_len=128, record_steps=records)
    engines.append(Engine.of(model, config))
    return engines[-1].generate(PROMPTS, params)


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_answers_are_those_of_the_reference(device: str, engines: list[Engine]) -> None:
    found = answers(model_on(device), SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0), engines, records=True)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        tokens = [*prompt, *answer.output_ids]
        rows = reference_logits(tiny_model("hybrid"), tokens)[len(prompt) - 1 : -1]
        assert list(answer.output_ids) == rows.argmax(-1).tolist()
        wanted = rows.log_softmax(-1).max(-1).values
        assert (torch.tensor([token.logprob for token in answer.sampled]) - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_recorded_steps_have_the_bits_of_plain_ones(device: str, temperature: float, engines: list[Engine]) -> None:
    """Sequences of different lengths, which end one after another, so that sizes come and go. On a GPU a recorded batch
    has rows that are nobody's, and the size of a batch decides in which order sums are taken."""
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=temperature, top_k=20, seed=5, logprobs=0)
    recorded = answers(model_on(device), params, engines, records=True)
    plain = answers(model_on(device), params, engines, records=False)
    if device == "cpu":
        assert [each.sampled for each in recorded] == [each.sampled for each in plain]
    assert [each.output_ids for each in recorded] == [each.output_ids for each in plain]
    theirs, ours = (torch.tensor([t.logprob for each in found for t in each.sampled]) for found in (plain, recorded))
    assert (theirs - ours).abs().max() < TOLERANCE


@pytest.mark.gpu
@ON_GPU
def test_drafts_are_the_same_with_graphs(engines: list[Engine]) -> None:
    """Chains of the MTP layer and the steps that verify them, as graphs of several lengths."""
    model = make_in_form("next, sizes of the native kernels", "bfloat16").to("cuda")
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    recorded = answers(model, params, engines, records=True)
    plain = answers(model, params, engines, records=False)
    assert [each.output_ids for each in recorded] == [each.output_ids for each in plain]


@pytest.mark.gpu
@ON_GPU
def test_tokens_are_drawn_on_the_gpu_as_on_the_cpu() -> None:
    rows = logits(300, seed=4, vocab_size=5000)
    many = [
        SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.3),
        SamplingParams(temperature=1.0, min_p=0.05, logprobs=3),
        SamplingParams(),
    ]
    windows = [Window(request(many[r % len(many)])) for r in range(len(rows))]
    ours, theirs = verify(rows.cuda(), windows), verify(rows, windows)
    assert [v.tokens[0].token_id for v in ours] == [v.tokens[0].token_id for v in theirs]
