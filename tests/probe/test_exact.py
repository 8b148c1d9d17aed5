"""Whoever looks changes nothing, and an edit changes what it names: no bit of another row, layer or sequence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from qnext.model import Batch, CausalLM
from qnext.probe import LAST, Edit, ModelProbe, Where, same_bits, tap_names
from qnext.probe.names import READ_ONLY
from tests.model.models import OneRequest, make_in_form, make_model, random_tokens
from tests.model.wrapping import CONFIG

NAMES = tap_names(CONFIG)
EDITED = [name for name in NAMES if not name.endswith(READ_ONLY)]


@torch.no_grad()
def whole(model: CausalLM) -> list[Tensor]:
    """Two sequences in one batch, without a cache, and the MTP layer behind them."""
    tokens = random_tokens(CONFIG, 71)
    batch = Batch.from_lengths(tokens[:70], [47, 23])
    trunk = model(batch)
    return [model.logits(trunk.hidden_TD), model.draft_hidden(tokens[1:], trunk, batch)]


@torch.no_grad()
def in_pieces(model: CausalLM) -> list[Tensor]:
    """A prompt in two pieces, and three tokens of decode; at last what the caches hold."""
    request, tokens = OneRequest(model, 80), random_tokens(CONFIG, 73)
    found = [model.logits(model(request.batch(part)).hidden_TD) for part in tokens.split([40, 30, 1, 1, 1])]
    kept = [tensor[1] for slots in request.delta.values() for tensor in slots.tensors]
    pages = [tensor[request.table_M[:4]] for number in (1,) for tensor in request.kv[number].tensors]
    return [*found, *kept, *pages]


FORMS = {"float32": "float32", "bfloat16": "bfloat16", "int4": "int4-g32"}
PASSES = {"whole": whole, "in pieces": in_pieces}


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("form", FORMS)
def test_an_identity_changes_no_bit(backend: str, form: str, run: str) -> None:
    """Every tap is kept and every one that can be is edited, by a copy; and once more by nothing but a look."""
    if (backend, form) == ("torch", "int4"):
        pytest.skip("panels are weights of the kernels")
    model, compute = make_model_in(form), PASSES[run]
    plain = compute(model)
    with ModelProbe(model, NAMES, edits=[Edit(name, torch.clone) for name in EDITED]) as probe:
        copied = compute(model)
    with ModelProbe(model, NAMES, where=LAST):
        seen = compute(model)
    after = compute(model)
    for found in (copied, seen, after):
        assert all(same_bits(one, other) for one, other in zip(found, plain, strict=True))
    missed = {name for name in NAMES if not name.startswith("mtp.") or run == "whole"} - set(probe.captures.names())
    assert not missed


def make_model_in(form: str) -> CausalLM:
    changes = {"layer_types": CONFIG.layer_types, "num_nextn_predict_layers": 1}
    return make_in_form("next, sizes of the native kernels", FORMS[form], **changes)


ONE_BY_ONE = [name for name in EDITED if not name.startswith("mtp.") and name != "logits"]
PLACES = [*(("cpu", name) for name in ONE_BY_ONE), *(("torch", name) for name in ONE_BY_ONE[3::6])]


@pytest.mark.parametrize(("backend", "name"), PLACES, indirect=["backend"])
def test_an_edit_changes_its_row_and_what_follows(backend: str, name: str) -> None:
    """Rows before it and the other sequence keep their bits where a kernel gives them."""
    model, batch = make_model(CONFIG), Batch.from_lengths(random_tokens(CONFIG, 35), [23, 12])
    is_choice = name.endswith("router.experts")
    change = partial(_next_expert if is_choice else _other, shift=0.1)
    with torch.no_grad():
        plain = model.logits(model(batch).hidden_TD)
        with ModelProbe(model, edits=[Edit(name, change, Where.at(11, sequences=[0]))]):
            edited = model.logits(model(batch).hidden_TD)
    differs_T = (edited - plain).abs().amax(1) > 1e-4
    first = 12 if name.endswith("delta.state") else 11
    assert differs_T[first]
    if backend == "cpu":
        assert same_bits(edited[:11], plain[:11])
        assert same_bits(edited[23:], plain[23:])
    else:
        assert not differs_T[:first].any() and not differs_T[23:].any()


def _other(x: Tensor, *, shift: float) -> Tensor:
    return 1.5 * x + shift


def _next_expert(experts_RA: Tensor, *, shift: float) -> Tensor:
    return (experts_RA + 1) % CONFIG.num_experts


@pytest.mark.parametrize(
    "name", ["layers.0.delta.value", "layers.0.delta.state", "layers.1.attention.key", "embedding"]
)
def test_an_edit_in_pieces_is_that_of_the_whole(backend: str, name: str) -> None:
    """What is carried to the next piece and to decode is what the edit made of it."""
    model = make_model(CONFIG)
    edit = Edit(name, lambda x: 2 * x, Where.at(20))
    tokens = random_tokens(CONFIG, 73)
    with torch.no_grad(), ModelProbe(model, edits=[edit]):
        once = model.logits(model(Batch.from_lengths(tokens, [73])).hidden_TD)
        pieces = torch.cat(in_pieces(model)[:5])
    plain = torch.cat(in_pieces(model)[:5])
    # Two orders of summation in fp32, behind two layers.
    assert torch.allclose(pieces, once, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(pieces[21:], plain[21:], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["layers.0.delta.core_out", "layers.0.experts.out", "layers.0.residual_mid", "layers.1.attention.gate"]
)
def test_a_gradient_flows_through_an_edit_that_changes_no_bit(backend: str, name: str) -> None:
    """As a steering vector of zeros begins to learn: the slope is that of differences in fp64."""
    model, wide = make_model(CONFIG), make_model(CONFIG).double()
    batch = Batch.from_lengths(random_tokens(CONFIG, 30), [30])
    plain, zero = model.logits(model(batch).hidden_TD), torch.zeros(1, requires_grad=True)
    with ModelProbe(model, edits=[Edit(name, partial(torch.add, other=zero))]):
        steered = model.logits(model(batch).hidden_TD)
    assert torch.equal(steered, plain)
    (slope,) = torch.autograd.grad(steered.square().sum(), zero)
    step, sums = 1e-6, []
    for shift in (-step, step):
        with torch.no_grad(), ModelProbe(wide, edits=[Edit(name, partial(torch.add, other=shift))]):
            sums.append(wide.logits(wide(batch).hidden_TD).square().sum())
    # fp32 beside fp64, in a sum of three thousand squares
    assert float(slope) == pytest.approx(float(sums[1] - sums[0]) / (2 * step), rel=1e-3)


def test_a_kept_tensor_is_a_part_of_the_graph() -> None:
    model = make_model(CONFIG)
    batch = Batch.from_lengths(random_tokens(CONFIG, 30), [30])
    plain = model.logits(model(batch).hidden_TD)
    name = "layers.0.delta.value"
    with ModelProbe(model, [name, "logits"], keeps_gradients=True) as probe:
        found = model.logits(model(batch).hidden_TD)
    assert torch.equal(found, plain)
    total = probe.captures.values("logits").sum()
    assert torch.autograd.grad(total, model.model.embed_tokens.weight)[0].any()
