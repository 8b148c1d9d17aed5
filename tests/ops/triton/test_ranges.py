"""Slots, places, pages and experts that do not exist: no other memory is touched, and what depends on them is NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.ops import AttentionCache, AttentionWeights, DeltaCache, DeltaWeights, Packing, Rope, Routing

from ..compare import randn
from .device import DEVICE, here
from .test_matrices import make_weight


class Guarded:
    """A tensor in the middle of memory whose other numbers must stay as they are."""

    def __init__(self, x: Tensor) -> None:
        self.memory = here(torch.full((3, *x.shape), 7.0).to(x.dtype))
        self.inner = self.memory[1]
        self.inner.copy_(x)

    def is_whole(self) -> bool:
        return bool((self.memory[::2] == 7.0).all())


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_slot_that_does_not_exist(wrong: int) -> None:
    shapes = ((88, 1, 4), (2,), (2,), (28,))
    weights = DeltaWeights(*here([randn(*s, seed=n, dtype=torch.float32) for n, s in enumerate(shapes)]), 1e-6, 1, 16)
    conv, state = (Guarded(randn(3, *s, seed=9, dtype=torch.float32)) for s in ((3, 88), (2, 16, 28)))
    rows = here([randn(3, width, seed=width, dtype=torch.float32) for width in (144, 4)])
    packing, slots_N = Packing([1, 2], device=DEVICE), here(torch.tensor([1, wrong]))

    def step(slots_N: Tensor, packing: Packing, rows: list[Tensor], conv: Tensor, state: Tensor) -> Tensor:
        cache = DeltaCache(conv, state, slots_N, torch.zeros_like(slots_N, dtype=torch.bool), False)
        return ops.gated_delta_mixer(*rows, weights, packing=packing, cache=cache)

    alone = [conv.inner.clone(), state.inner.clone()]
    wanted = step(slots_N[:1], Packing([1], device=DEVICE), [x[:1] for x in rows], *alone)
    out = step(slots_N, packing, rows, conv.inner, state.inner)
    assert torch.equal(out[:1], wanted) and out[1:].isnan().all()
    assert conv.is_whole() and state.is_whole()
    assert torch.equal(conv.inner, alone[0]) and torch.equal(state.inner, alone[1])


@pytest.mark.parametrize("wrong", ["place", "place below", "page", "page below", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_places_and_pages_that_do_not_exist(wrong: str, dtype: torch.dtype) -> None:
    weights = AttentionWeights(*here([torch.zeros(16), torch.zeros(16)]), 1e-6, True, True, 0.3)
    rope = Rope(*here([randn(2, 3, seed=seed, dtype=torch.float32) for seed in (0, 1)]))
    rows = here([randn(2, width, seed=width, dtype=torch.float32) for width in (64, 16, 17)])
    tables_NM, contexts_N, places_T = torch.tensor([[0, 1], [2, 3]]), torch.tensor([6, 7]), torch.tensor([5, 14])
    tables_NM[1, 0] = {"page": 4, "page below": -1}.get(wrong, 2)
    places_T[1] = {"place": 16, "place below": -1}.get(wrong, 14)
    contexts_N[1] = 9 if wrong == "context" else 7

    def step(sequences: slice, pages: list[Tensor], scales: list[Tensor]) -> Tensor:
        numbers = [x[sequences] for x in (tables_NM, contexts_N, places_T)]
        kept = scales if dtype == torch.int8 else [None, None]
        cache = AttentionCache(*pages, *kept, here(numbers[0]), numbers[1], here(numbers[2]))
        q_TX, k_TY, v_TY = (x[sequences] for x in rows)
        turned = Rope(*(x[sequences] for x in rope))
        packing = Packing([1] * len(q_TX), device=DEVICE)
        return ops.attention_mixer(q_TX, k_TY, v_TY[:, 1:], weights, rope=turned, packing=packing, cache=cache)

    memory = [Guarded((randn(4, 1, 4, 16, seed=5 + n, dtype=torch.float32) * 20).to(dtype)) for n in range(2)]
    scales = [Guarded(torch.full((4, 1, 4), 0.05)) for _ in range(2)]
    wanted = step(slice(0, 1), *([x.inner.clone() for x in part] for part in (memory, scales)))
    out = step(slice(0, 2), *([x.inner for x in part] for part in (memory, scales)))
    assert torch.equal(out[:1], wanted) and out[1:].isnan().all()
    assert all(x.is_whole() for x in (*memory, *scales))


@pytest.mark.parametrize("num_tokens", [2, 9])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_expert_that_does_not_exist(wrong: int, num_tokens: int) -> None:
    kind = "fp32" if num_tokens == 2 else "int8"
    weights = [make_weight(kind, 3, *shape, seed=n) for n, shape in enumerate(((16, 32), (32, 8)))]
    x_TD = here(randn(num_tokens, 32, seed=3, dtype=torch.float32))
    experts_TA = here(torch.tensor([[0, 2]]).repeat(num_tokens, 1))
    scores_TA = torch.full_like(experts_TA, 0.5, dtype=torch.float32)
    wanted = ops.experts_swiglu(x_TD, *weights, routing=Routing(scores_TA, experts_TA))
    experts_TA[1, 1] = wrong
    out = ops.experts_swiglu(x_TD, *weights, routing=Routing(scores_TA, experts_TA))
    assert out[1].isnan().all() and wanted.isfinite().all()
    assert torch.equal(out[[0, *range(2, num_tokens)]], wanted[[0, *range(2, num_tokens)]])
