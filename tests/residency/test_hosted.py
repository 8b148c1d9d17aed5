"""Experts between host and device: the same bits as on the device alone, and which of them were copied."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.residency.ahead import NUM_PLACES, CopiesAhead
from qnext.residency.hosted import DeviceSlots, HostedExperts, WholeLayer

E, D, F, TOP_K = 12, 32, 16, 3
CPU = torch.device("cpu")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def int4(*shape: int) -> ops.QuantizedWeight:
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=torch.Generator().manual_seed(shape[-1]))
    return ops.QuantizedWeight(codes.to(torch.uint8), floats(*shape[:-1], shape[-1] // 16).abs(), 4, 16)


def fp8(*shape: int) -> ops.Fp8Weight:
    scales = floats(shape[0], shape[1] // 16, shape[2] // 16).abs()
    return ops.Fp8Weight(floats(*shape).to(torch.float8_e4m3fn), scales, (16, 16))


FORMS = {"fp32": floats, "int4": int4, "fp8": fp8}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_slots", [TOP_K, 7, E + 5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
def test_bits_are_those_of_experts_on_the_device(form: str, num_slots: int, device: str) -> None:
    """Over calls of one token and of many, of which some need more experts than there are slots."""
    gate_up, down = FORMS[form](E, 2 * F, D), FORMS[form](E, D, F)
    experts = HostedExperts(gate_up, down, num_slots=num_slots, whole=WholeLayer(torch.device(device)))
    there = gate_up.to(device), down.to(device)
    hosted = ops.HostedWeight(gate_up, experts), ops.HostedWeight(down, experts)
    generator = torch.Generator().manual_seed(num_slots)
    for num_tokens in (1, 1, 40, 1, 2, 1, 9, 1):
        x_TD, scores_TE = (torch.randn(num_tokens, size, generator=generator).to(device) for size in (D, E))
        routing = ops.route(scores_TE, top_k=TOP_K, norm_topk_prob=True)
        wanted_TD = ops.experts_swiglu(x_TD, *there, routing=routing)
        assert torch.equal(ops.experts_swiglu(x_TD, *hosted, routing=routing), wanted_TD)
    misses = experts.counts["misses"] + experts.counts["sweep_misses"]
    assert experts.bring(routing, keeps_numbers=True).routing is routing
    assert misses >= 9  # a call of 40 tokens needs more than half of all
    if num_slots > E:
        assert misses == E


@torch.no_grad()
def run_layers(
    form: str, device: str, *, are_right: bool, num_tokens: list[int], looks_ahead: bool = True
) -> list[HostedExperts]:
    """Three layers of the same input, over calls of so many tokens; bits are those of experts on the device. Routers
    are what is asked early, or others."""
    stacks = [tuple(FORMS[form](E, *shape).to("cpu") for shape in ((2 * F, D), (D, F))) for _ in range(3)]
    routers = [torch.randn(E, D, generator=torch.Generator().manual_seed(n)).to(device) for n in range(3)]
    layers = [HostedExperts(*each, num_slots=TOP_K, whole=WholeLayer(torch.device(device))) for each in stacks]
    ahead = CopiesAhead(stacks[0], torch.device(device))
    asked = routers if are_right else [-router for router in routers]
    for n, layer in enumerate(layers if looks_ahead else ()):
        layer.look_ahead(ahead, (layers[n + 1], asked[n + 1]) if n < 2 else None)
    generator = torch.Generator().manual_seed(9)
    for count in num_tokens:
        x_TD = torch.randn(count, D, generator=generator).to(device)
        for layer, router, stack in zip(layers, routers, stacks, strict=True):
            routing = ops.route(x_TD @ router.T, top_k=TOP_K, norm_topk_prob=True)
            hosted = [ops.HostedWeight(part, layer) for part in stack]
            wanted_TD = ops.experts_swiglu(x_TD, *(part.to(device) for part in stack), routing=routing)
            assert torch.equal(ops.experts_swiglu(x_TD, *hosted, routing=routing), wanted_TD)
    return layers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])])
def test_what_the_next_layer_needs_is_copied_ahead(form: str, device: str) -> None:
    """Also beside calls of many tokens, which guess nothing and whose layers are copied whole."""
    first, *later = run_layers(form, device, are_right=True, num_tokens=[1, 1, 30, 1, 2, 1, 5, 1])
    assert first.counts["guesses"] == 0
    for layer in later:
        guesses, used = layer.counts["guesses"], layer.counts["guesses_used"]
        assert 6 <= used <= guesses <= 6 * NUM_PLACES  # the best three of a token, as far as they are in no slot


def test_guesses_change_no_count_and_stop_where_they_are_wrong() -> None:
    tokens = [1] * 130
    plain = run_layers("fp32", "cpu", are_right=True, num_tokens=tokens, looks_ahead=False)
    for are_right in (True, False):
        layers = run_layers("fp32", "cpu", are_right=are_right, num_tokens=tokens)
        for layer, other in zip(layers, plain, strict=True):
            assert all(layer.counts[name] == other.counts[name] for name in ("hits", "misses"))
            wrong = layer.counts["guesses"] - layer.counts["guesses_used"]
            assert layer.counts["reads"] == layer.counts["misses"] + wrong
        guesses, used = (sum(layer.counts[name] for layer in layers) for name in ("guesses", "guesses_used"))
        assert used > 500 if are_right else used < 0.1 * guesses and guesses < 100 + 4 * NUM_PLACES


def test_slots_belong_to_those_used_last() -> None:
    slots, order = DeviceSlots(5), []
    rng = random.Random(0)
    for _ in range(300):
        needed = sorted(rng.sample(range(20), rng.randint(1, 5)))
        before = dict(slots.slot_of)
        loads = slots.take(needed)
        hits = [expert for expert in needed if expert in before]
        order = [expert for expert in order if expert not in needed] + hits + [e for e in needed if e not in before]
        assert {expert for expert, _ in loads} == set(needed) - before.keys()
        assert set(slots.slot_of) == set(order[-5:]) and set(needed) <= set(slots.slot_of)
        assert len(set(slots.slot_of.values())) == len(slots.slot_of) and max(slots.slot_of.values()) < 5
        assert all(slots.slot_of[expert] == slot for expert, slot in before.items() if expert in slots.slot_of)


def test_a_form_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(TypeError, match="HostedWeight cannot be copied"):
        experts = HostedExperts(floats(E, 2 * F, D), floats(E, D, F), num_slots=4, whole=WholeLayer(CPU))
        HostedExperts(
            ops.HostedWeight(floats(E, 2 * F, D), experts), floats(E, D, F), num_slots=4, whole=WholeLayer(CPU)
        )
