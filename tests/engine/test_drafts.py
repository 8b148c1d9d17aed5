"""Steps whose tokens may be rejected: what a sequence keeps is as if the rejected tokens had never been computed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qnext.engine.cache import BLOCK_SIZE, Cache
from qnext.engine.request import Request, SamplingParams
from qnext.engine.scheduling.scheduler import SequencePlan, StepPlan
from qnext.model import Batch, CausalLM
from qnext.ops import Packing, backend
from tests.engine.models import reference_logits, tiny_model
from tests.model.models import make_in_form

NUM_DRAFTS = 4
MAX_LEN = 128
needs_native = pytest.mark.skipif(
    backend.native_module() is None, reason="the native kernels are not built or not wanted"
)
NATIVE_MODEL = "next, sizes of the native kernels"


class Sequences:
    """A cache full of NaN and sequences in it, each with the tokens that it will turn out to have."""

    def __init__(self, model: CausalLM, lengths: Sequence[int], *, num_slots: int = 7) -> None:
        self.model = model
        self.pages = -(-MAX_LEN // BLOCK_SIZE)
        self.cache = Cache(
            model.config, num_blocks=num_slots * self.pages, num_slots=num_slots, max_model_len=MAX_LEN,
            dtype=model.dtype, num_draft_tokens=NUM_DRAFTS, poison=True,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(len(lengths))
        self.tokens = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
        self.done = [0] * len(lengths)
        self.logits: list[list[Tensor]] = [[] for _ in lengths]
        self.requests = [self._request(n, slot=(3 * n + 1) % num_slots) for n in range(len(lengths))]

    def _request(self, n: int, slot: int) -> Request:
        pages = reversed(range(self.pages if self.cache.kv else 0))
        blocks = [slot + len(self.cache._table_owner) * page for page in pages]
        return Request(
            str(n), tuple(self.tokens[n]), SamplingParams(), 0, 1, frozenset(), blocks=blocks, slot=slot
        )  # fmt: skip

    def left(self, n: int) -> int:
        return len(self.tokens[n]) - self.done[n]

    def step(self, parts: Sequence[tuple[int, int, bool, int]]) -> None:
        """Parts of a step: sequence, number of tokens, whether they are drafts, how many of them are its own."""
        plans = []
        for n, count, _, accepted in parts:
            own = self.tokens[n][self.done[n] : self.done[n] + accepted]
            wrong = [(token + 1) % self.model.config.vocab_size for token in range(count - accepted)]
            plans.append(SequencePlan(self.requests[n], (*own, *wrong), self.done[n], True))
        packing = Packing([count for _, count, _, _ in parts])
        starts_N = torch.tensor([plan.start for plan in plans])
        positions_T = packing.offsets_T + starts_N[packing.sequence_ids_T]
        token_ids_T = torch.tensor([token for plan in plans for token in plan.token_ids])
        view = self.cache.view(plans, packing, positions_T, is_draft=[is_draft for _, _, is_draft, _ in parts])
        hidden_TD = self.model(Batch(token_ids_T, positions_T, packing, view)).hidden_TD
        logits = self.model.logits(hidden_TD).split(list(packing.lengths))
        for (n, _, is_draft, accepted), rows in zip(parts, logits, strict=True):
            self.logits[n].append(rows[:accepted])
            self.done[n] += accepted
            if is_draft:
                slot = self.requests[n].slot
                assert slot is not None
                self.cache.commit(slot, accepted)

    def random_step(self, choose: random.Random) -> None:
        open_ = [n for n in range(len(self.done)) if self.left(n)]
        parts = []
        for n in choose.sample(open_, choose.randint(1, len(open_))):
            is_draft = choose.random() < 0.7
            count = choose.randint(1, NUM_DRAFTS) if is_draft else min(self.left(n), choose.choice([1, 2, 9, 30]))
            accepted = min(self.left(n), choose.randint(0, count)) if is_draft else count
            parts.append((n, count, is_draft, accepted))
        self.step(parts)

    def run_to_the_end(self, seed: int) -> list[Tensor]:
        choose = random.Random(seed)
        while any(self.left(n) for n in range(len(self.done))):
            self.random_step(choose)
        return [torch.cat(rows) for rows in self.logits]


def logits_in_one_step(model: CausalLM, tokens: list[int]) -> Tensor:
    alone = Sequences(model, [len(tokens)])
    alone.tokens[0] = tokens
    alone.step([(0, len(tokens), False, len(tokens))])
    return alone.logits[0][0]


@needs_native
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int4-g32"])
@torch.inference_mode()
def test_native_models_keep_every_bit(form: str) -> None:
    model = make_in_form(NATIVE_MODEL, form)
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
    model = make_in_form(NATIVE_MODEL, "float32")
    sequences = Sequences(model, [40, 40, 25])
    sequences.step([(0, 9, False, 9), (1, 5, False, 5), (2, 3, False, 3)])
    sequences.step([(0, 4, True, 3), (1, 4, True, 4), (2, 2, False, 2)])
    source, target, other = (r.slot for r in sequences.requests)
    assert source is not None and target is not None and other is not None
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
    model = make_in_form(NATIVE_MODEL, "float32")
    sequences, plain = Sequences(model, [40, 30]), Sequences(model, [40, 30])
    sequences.step([(0, 9, False, 9), (1, 4, True, 2)])
    sequences.step([(0, 4, True, 2)])
    slots = [request.slot for request in sequences.requests if request.slot is not None]
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
    first, second = sequences.requests
    assert first.slot is not None
    sequences.cache.prepare(StepPlan((), tuple(first.blocks), (first.slot,)))
    second.slot, second.blocks = first.slot, first.blocks
    sequences.step([(1, 3, True, 3)])
    sequences.step([(1, 27, False, 27)])
    logits = torch.cat(sequences.logits[1])
    assert (logits - reference_logits(model, sequences.tokens[1])).abs().max() < 2e-4


def test_bytes_are_counted_and_numbers_checked() -> None:
    config = tiny_model("hybrid").config

    def make(num_draft_tokens: int) -> Cache:
        return Cache(
            config, num_blocks=2, num_slots=5, max_model_len=32, dtype=torch.float32, num_draft_tokens=num_draft_tokens
        )

    keys, values = 2 * 7, 6 * 5
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
