"""Batches filled up to few sizes: the same tokens, the same counts, and as many recordings as there are sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qnext.engine import Engine, Request, SamplingParams
from qnext.engine.execution import recorded
from qnext.engine.execution.padded import NUM_EXACT, padded_sizes, padding_of
from qnext.engine.execution.recorded import largest_recordings
from qnext.model import CausalLM, initialize
from qnext.ops import backend_of
from tests.engine.drafting import draft_always, make_engine, prompts_of
from tests.engine.executors import local
from tests.engine.models import tiny_model

OPTIONS: dict[str, dict[str, Any]] = {
    "alone": {"speculation": False},
    "drafts": {"speculation": True, "max_draft_tokens": 3},
    "preemption": {"speculation": False, "num_blocks": 6},
    "uncounted": {"speculation": False, "count_experts": False},
    "uncounted drafts": {"speculation": True, "max_draft_tokens": 3, "count_experts": False},
}


def test_padding_is_that_of_the_smallest_batch() -> None:
    for num_sequences in range(1, 65):
        for max_rows in (1, 2, 4):
            for num_tokens in range(num_sequences, min(64, num_sequences * max_rows) + 1):
                padding = padding_of(num_sequences, num_tokens, max_rows=max_rows, max_tokens=64)
                if padding is None:
                    assert num_tokens > num_sequences
                    continue
                assert all(1 <= length <= max_rows for length in padding)
                assert not padding or num_sequences + len(padding) > NUM_EXACT
                assert num_tokens + sum(padding) in padded_sizes(num_sequences, max_rows, max_tokens=64)
    assert padding_of(8, 8, max_rows=4, max_tokens=64) == padding_of(1, 3, max_rows=4, max_tokens=64) == ()
    assert padding_of(250, 256, max_rows=4, max_tokens=256) is None
    assert len(padded_sizes(256, 1, max_tokens=256)) == 35
    assert largest_recordings(20, 0, max_tokens=256, is_padded=True) == [24, 16, 8, 4, 2, 1]
    assert len(largest_recordings(64, 3, max_tokens=256, is_padded=True)) == 40


def _model() -> CausalLM:
    model = CausalLM(tiny_model("hybrid").config.with_(num_nextn_predict_layers=1)).eval()
    initialize(model, seed=3)
    return model


def _random_traffic(engine: Engine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What requests are answered that come at random."""
    source = random.Random(5)
    waiting = list(enumerate(prompts))
    requests: list[Request] = []
    while waiting or engine.has_unfinished:
        while waiting and source.random() < 0.5:
            number, prompt = waiting.pop(0)
            params = SamplingParams(
                max_tokens=source.randint(2, 30), ignore_eos=True, temperature=number % 2, seed=number
            )
            requests.append(engine.add_request(prompt, params))
        engine.step()
    engine.check_integrity()
    return [tuple(request.output_ids) for request in requests]


class _Again:
    """A recording that computes once more, to the same memory."""

    num_bytes = 0

    def __init__(self, compute: Callable[[], tuple[torch.Tensor, object]], result: torch.Tensor) -> None:
        self._compute, self._result = compute, result

    def replay(self) -> None:
        with torch.inference_mode():
            self._result.copy_(self._compute()[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_and_counts_are_those_of_exact_sizes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, since on the CPU no row depends on the others. What counts experts beside the kernels is no native
    call, and is computed anew."""
    model = _model()
    prompts = prompts_of(model, [20, 3, 1, 33, 9, 2, 17, 5, 1, 12])
    prompts[6:8] = [*prompts[3], 4], [*prompts[0], 8, 9]  # which begin as others did

    def record(compute: Any, device: torch.device) -> Any:
        result = compute()
        return result, _Again(compute, result[0])

    if options.get("count_experts", True):
        monkeypatch.setattr(recorded, "record", record)
    found = []
    for pads in (False, True):
        backend = replace(backend_of(torch.device("cpu")), pads_recordings=pads)
        for place in ("assembly", "sizes", "execution.recorded", "execution.inputs"):
            monkeypatch.setattr(f"qnext.engine.{place}.backend_of", lambda _, backend=backend: backend)
        engine = make_engine(model, **{"max_num_seqs": 7, **options})
        if engine.drafter is not None:
            draft_always(engine, 7)
        answers = _random_traffic(engine, prompts)
        load = engine.expert_load()
        # How often the MTP layer is tried on known tokens depends on what it took.
        found.append((answers, load and load.layers[: len(model.model.layers)], engine.metrics.num_preemptions))
        kept = local(engine)._decoding._batches
        assert kept, "a decoding step was recorded"
        if pads:
            assert {size[:2] for size in kept} <= {(n, n * each) for n in (1, 2, 4, 8, 16) for each in (1, 2, 3, 4)}
    assert found[0] == found[1]
    assert (found[0][2] > 0) == ("num_blocks" in options)
