"""A whole model on GPU kernels: steps, drafts that are accepted or rejected, pieces of prompts, over real caches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from qnext.ops import triton as gpu
from qnext.ops.triton import experts, matrices
from tests.engine.models import reference_logits, tiny_model
from tests.engine.sequences import Sequences

from .device import DEVICE

SERVED = [
    "rms_norm",
    "normed_linears",
    "add_linear",
    "normed_route",
    "gated_delta_mixer",
    "attention_mixer",
    "add_experts",
]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the sequences of these tests are on the CPU")
@torch.inference_mode()
def test_a_model_with_drafts_has_the_logits_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str) -> None:
        op = getattr(gpu, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(gpu, name, call)

    for name in SERVED:
        counted(name)
    # Programs are interpreted one after another: few large ones are faster.
    monkeypatch.setattr(matrices.Tile, "of", lambda *_: matrices.Tile(16, 128, 128, 3))
    monkeypatch.setattr(experts, "_BLOCK_OUTPUTS", 32)
    model = tiny_model("hybrid")
    sequences = Sequences(model, [4, 3])
    all_logits = sequences.run_to_the_end(0)
    assert set(calls) == set(SERVED)
    with monkeypatch.context() as patch:
        for name in (*SERVED, "route", "experts_swiglu"):
            patch.setattr(gpu, f"serves_{name}", lambda *args, **kwargs: False)
        for tokens, logits in zip(sequences.tokens, all_logits, strict=True):
            assert (logits - reference_logits(model, tokens)).abs().max() < 2e-4
