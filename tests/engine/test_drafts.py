"""Steps whose tokens may be rejected: what a sequence keeps is as if the rejected tokens had never been computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext.engine.execution.cache import Cache, CacheDtypes, CacheSizes
from qnext.engine.policy.step import StepPlan
from qnext.model import CausalLM
from tests.engine.models import NATIVE, needs_native, reference_logits, tiny_model
from tests.engine.sequences import Sequences
from tests.model.models import make_in_form


def logits_in_one_step(model: CausalLM, tokens: list[int]) -> Tensor:
    alone = Sequences(model, [len(tokens)])
    alone.tokens[0] = tokens
    alone.step([(0, len(tokens), False, len(tokens))])
    return alone.logits[0][0]


@needs_native
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
@torch.inference_mode()
def test_native_models_keep_every_bit(form: str) -> None:
    model = make_in_form(NATIVE, form)
    for seed in range(4):
        sequences = Sequences(model, [60, 17, 33])
        for tokens, logits in zip(sequences.tokens, sequences.run_to_the_end(seed), strict=True):
            assert torch.equal(logits, logits_in_one_step(model, tokens))


@pytest.mark.parametrize("kind", ["hybrid", "full", "linear", "dense"])
@torch.inference_mode()
def test_the_reference_keeps_drafts_apart(kind: str) -> None:
    """The sizes of these models fit no native kernel of Gated DeltaNet."""
    model = tiny_model(kind)
    for seed in range(3):
        sequences = Sequences(model, [60, 17, 33])
        for tokens, logits in zip(sequences.tokens, sequences.run_to_the_end(seed), strict=True):
            assert (logits - reference_logits(model, tokens)).abs().max() < 2e-4


@needs_native
@torch.inference_mode()
def test_a_copied_slot_goes_on_alike() -> None:
    """Accepted tokens are a part of the copy; what the target held, committed or not, is no part of it."""
    model = make_in_form(NATIVE, "float32")
    sequences = Sequences(model, [40, 40, 25])
    sequences.step([(0, 9, False, 9), (1, 5, False, 5), (2, 3, False, 3)])
    sequences.step([(0, 4, True, 3), (1, 4, True, 4), (2, 2, False, 2)])
    source, target, other = sequences.slots
    cache = sequences.cache
    untouched = [layer.state[other].clone() for layer in cache.delta.values()]
    cache.copy_slots([source, source], [target, 2])
    for layer, kept in zip(cache.delta.values(), untouched, strict=True):
        assert layer.pending is not None
        assert not layer.pending.num_accepted[[source, target, 2]].any()
        for copy in (target, 2):
            assert torch.equal(layer.state[copy], layer.state[source])
            assert torch.equal(layer.conv[copy], layer.conv[source])
        assert torch.equal(layer.state[other], kept)
    plain = Sequences(model, [40, 40, 25])
    plain.step([(0, 12, False, 12)])
    for layer, wanted in zip(cache.delta.values(), plain.cache.delta.values(), strict=True):
        assert torch.equal(layer.state[target], wanted.state[source])
        assert torch.equal(layer.conv[target], wanted.conv[source])
    for n in (0, 2):
        sequences.step([(n, sequences.left(n), False, sequences.left(n))])
        assert torch.equal(torch.cat(sequences.logits[n]), logits_in_one_step(model, sequences.tokens[n]))


@needs_native
@torch.inference_mode()
def test_a_flush_applies_what_was_accepted() -> None:
    model = make_in_form(NATIVE, "float32")
    sequences, plain = Sequences(model, [40, 30]), Sequences(model, [40, 30])
    sequences.step([(0, 9, False, 9), (1, 4, True, 2)])
    sequences.step([(0, 4, True, 2)])
    slots = sequences.slots
    for _ in range(2):  # the second finds nothing to do
        sequences.cache.flush(slots)
    plain.step([(0, 11, False, 11), (1, 2, False, 2)])
    for layer, wanted in zip(sequences.cache.delta.values(), plain.cache.delta.values(), strict=True):
        assert torch.equal(layer.state[slots], wanted.state[slots])
        assert torch.equal(layer.conv[slots], wanted.conv[slots])


@torch.inference_mode()
def test_a_slot_forgets_its_last_owner() -> None:
    """A request that ended with tokens committed leaves nothing to the next one in its slot."""
    model = tiny_model("hybrid")
    sequences = Sequences(model, [30, 30])
    sequences.step([(0, 9, False, 9)])
    sequences.step([(0, 4, True, 4)])
    sequences.cache.forget(StepPlan((), sequences.blocks[0], (sequences.slots[0],)))
    sequences.slots[1], sequences.blocks[1] = sequences.slots[0], sequences.blocks[0]
    sequences.step([(1, 3, True, 3)])
    sequences.step([(1, 27, False, 27)])
    logits = torch.cat(sequences.logits[1])
    assert (logits - reference_logits(model, sequences.tokens[1])).abs().max() < 2e-4


def test_bytes_are_counted_and_numbers_checked() -> None:
    config = tiny_model("hybrid").config

    def make(num_draft_tokens: int) -> Cache:
        sizes = CacheSizes(num_blocks=2, num_slots=5, max_model_len=32, num_draft_tokens=num_draft_tokens)
        return Cache(config, sizes, CacheDtypes(activations=torch.float32, kv=torch.float32))

    keys, values = 2 * 16, 6 * 32
    numbers = (2 * keys + values) + keys + values + 6  # inputs of the convolution, k, u, decay
    num_layers = config.layer_types.count("linear_attention")
    drafting, plain = make(3), make(0)
    assert drafting.state_bytes - plain.state_bytes == num_layers * 5 * (3 * numbers * 4 + 8)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"{count} accepted tokens"):
            drafting.commit(0, count)
    with pytest.raises(ValueError, match="1 accepted tokens"):
        plain.commit(0, 1)
    plain.flush([0, 1])
