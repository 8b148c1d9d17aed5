"""Whole models on native kernels: as exact as the reference, and the same bits however the work is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from model.models import PEER_CONFIGS, OneRequest, logits_of, make_in_form, random_tokens
from qnext.model import Batch, CausalLM
from qnext.ops import backends
from qnext.ops.cpu.kernels import take

pytestmark = pytest.mark.skipif(backends.cpu_kernels() is None, reason="the native kernels are not built or not wanted")

NAMES = ["next, sizes of the native kernels", "qwen3_moe, sizes of the native kernels"]
FORMS = ["float32", "bfloat16", "int4-g32", "int8-g32"]
NUM_TOKENS = 150


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_native_equals_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_in_form(name, "float32")
    tokens = random_tokens(model.config, NUM_TOKENS)
    native = logits_of(model, tokens)
    assert take(torch.ones(1))
    monkeypatch.setattr(backends, "cpu_kernels", lambda: None)
    assert not take(torch.ones(1))
    reference = logits_of(model, tokens)
    assert 0.0 < (native - reference).abs().max() < 1e-4


def logits_in_cuts(model: CausalLM, tokens_T: Tensor, cuts: list[int]) -> Tensor:
    request = OneRequest(model, len(tokens_T))
    ends = [0, *cuts, len(tokens_T)]
    return torch.cat(
        [model.logits(model(request.batch(tokens_T[start:end])).hidden_TD) for start, end in pairwise(ends)]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_cuts_change_no_bit(name: str, form: str) -> None:
    model = make_in_form(name, form)
    tokens = random_tokens(model.config, NUM_TOKENS)
    whole = logits_in_cuts(model, tokens, [])
    for cuts in ([64], [1, 2, 70, 133], [31, 64, 65, 128], list(range(1, NUM_TOKENS))):
        assert torch.equal(logits_in_cuts(model, tokens, cuts), whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_company_changes_no_bit(name: str, form: str) -> None:
    model = make_in_form(name, form)
    lengths = [3, 70, 1, 64, 12]
    tokens = random_tokens(model.config, sum(lengths))
    packed = model.logits(model(Batch.from_lengths(tokens, lengths)).hidden_TD)
    alone = [model.logits(model(Batch.from_lengths(part, [len(part)])).hidden_TD) for part in tokens.split(lengths)]
    assert torch.equal(packed, torch.cat(alone))


@torch.inference_mode()
def test_fewer_bits_cost_more() -> None:
    """Random experts amplify every rounding, so only the order and the scale are held, not a small error."""
    tokens = random_tokens(PEER_CONFIGS[NAMES[0]], NUM_TOKENS)
    exact = logits_of(make_in_form(NAMES[0], "float32"), tokens)
    errors = [
        ((logits_of(make_in_form(NAMES[0], form), tokens) - exact).norm() / exact.norm()).item() for form in FORMS[1:]
    ]
    bf16, int4, int8 = errors
    assert bf16 < int8 < int4 < 1.0, errors
