"""What is seen between the steps of a mixer fits together, and is what the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qnext.errors import UsageError
from qnext.model import Batch
from qnext.ops.reference.delta import delta_step
from qnext.probe import (
    Edit,
    ModelProbe,
    Where,
    avoid_expert,
    look,
    replace,
    same_bits,
    scale,
    silence_expert,
    steer,
    tap_names,
)
from tests.model.models import PEER_CONFIGS, OneRequest, make_model, random_tokens
from tests.model.wrapping import CONFIG

TOKENS = random_tokens(CONFIG, 75)


@torch.no_grad()
def seen_in_pieces(*parts: str) -> dict[str, Tensor]:
    """A prompt in two pieces and two tokens of decode."""
    model = make_model(CONFIG)
    request = OneRequest(model, 80)
    with ModelProbe(model, [f"layers.*.{part}" for part in parts]) as probe:
        for piece in TOKENS.split([40, 33, 1, 1]):
            model(request.batch(piece))
    return {name.split(".", 2)[2]: probe.captures.values(name) for name in probe.captures.names()}


def test_states_are_those_of_the_formula_at_every_token() -> None:
    found = seen_in_pieces("delta.*")
    q, k, v, g, beta = (found[f"delta.{step}"].double() for step in ("query", "key", "value", "decay", "beta"))
    repeats = v.shape[1] // k.shape[1]
    state = torch.zeros(v.shape[1], k.shape[2], v.shape[2], dtype=torch.float64)
    for t in range(len(TOKENS)):
        q_HK, k_HK = (x[t].repeat_interleave(repeats, dim=0) for x in (q, k))
        o_HV, u_HV, state = delta_step(state, q_HK, k_HK, v[t], g[t], beta[t])
        # fp32, up to 75 tokens that fade
        for name, wanted in (("state", state), ("update", u_HV), ("core_out", o_HV)):
            assert torch.allclose(found[f"delta.{name}"][t].double(), wanted, rtol=1e-3, atol=1e-5), (name, t)


def test_a_token_that_writes_nothing_leaves_half_of_the_state_after_a_half_life() -> None:
    """ln 2 / -g tokens."""
    g_H = torch.full((4,), -math.log(2.0) / 8)

    def silent(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    model = make_model(CONFIG)
    after = Where.at(*range(30, 46))
    edits = [
        Edit("layers.0.delta.beta", silent, after),
        Edit("layers.0.delta.decay", lambda g: g_H.expand_as(g), after),
    ]
    with torch.no_grad(), ModelProbe(model, ["layers.0.delta.state"], where=Where.at(29, 37, 45), edits=edits) as probe:
        model(Batch.from_lengths(TOKENS, [75]))
    before, half, quarter = probe.captures.values("layers.0.delta.state")
    assert torch.allclose(half, before / 2, rtol=1e-5) and torch.allclose(quarter, before / 4, rtol=1e-5)


def test_probabilities_sum_to_one_and_mix_the_values() -> None:
    found = seen_in_pieces("attention.*")
    p_THS, v_TGK, core_THK = (found[f"attention.{name}"].double() for name in ("probabilities", "value", "core_out"))
    assert torch.allclose(p_THS.sum(-1), torch.ones(()).double(), atol=1e-6)
    assert all(not p_THS[t, :, t + 1 :].any() for t in range(len(TOKENS)))
    v_THK = v_TGK.repeat_interleave(p_THS.shape[1] // v_TGK.shape[1], dim=1)
    assert torch.allclose(torch.einsum("ths,shk->thk", p_THS, v_THK), core_THK, rtol=1e-4, atol=1e-5)
    gated = core_THK * torch.sigmoid(found["attention.gate"].double())
    assert torch.allclose(found["attention.gated_out"].double(), gated.flatten(1), rtol=1e-4, atol=1e-5)


def test_experts_sum_up_to_the_feed_forward() -> None:
    found = seen_in_pieces("router.*", "experts.*", "shared.*", "ffn_*", "mixer_out", "residual_*")
    routed = (found["router.weights"][..., None] * found["experts.out"]).sum(1)
    total = routed + torch.sigmoid(found["shared.gate"]) * found["shared.out"]
    assert torch.allclose(total, found["ffn_out"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["residual_mid"], found["residual_in"] + found["mixer_out"])
    assert torch.equal(found["residual_out"], found["residual_mid"] + found["ffn_out"])
    chosen = found["router.probabilities"].gather(1, found["router.experts"])
    assert torch.allclose(chosen / chosen.sum(-1, keepdim=True), found["router.weights"], rtol=1e-5)


def test_a_look_is_the_mean_of_what_is_seen() -> None:
    model = make_model(CONFIG)
    found = look(model, TOKENS)
    with torch.no_grad(), ModelProbe(model, ["layers.1.attention.*", "layers.*.residual_out"]) as probe:
        model(Batch.from_lengths(TOKENS, [75]))
    p_THS = probe.captures.values("layers.1.attention.probabilities")
    (layer,) = found.attention
    assert layer.layer == 1
    assert layer.first_token_mass == pytest.approx(p_THS[1:, :, 0].mean(0).tolist(), rel=1e-5)
    gate_THK = probe.captures.values("layers.1.attention.gate")
    assert layer.gate_openness == pytest.approx(torch.sigmoid(gate_THK).mean((0, 2)).tolist(), rel=1e-5)
    largest = [float(probe.captures.values(f"layers.{i}.residual_out").abs().max()) for i in range(2)]
    assert found.largest_activation == pytest.approx(largest)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_families_without_gates_and_states(family: str) -> None:
    config = PEER_CONFIGS[family]
    model = make_model(config)
    assert not any(".delta." in name or name.endswith("attention.gate") for name in tap_names(config))
    tokens = random_tokens(config, 9)
    found = look(model, tokens)
    assert [layer.gate_openness for layer in found.attention] == [()] * config.num_hidden_layers
    with torch.no_grad(), ModelProbe(model, ["*"]) as probe:
        model(Batch.from_lengths(tokens, [9]))
    assert set(tap_names(config)) - set(probe.captures.names()) == {"logits"}


def test_what_is_kept_is_found_by_sequence_and_position() -> None:
    model = make_model(CONFIG)
    with torch.no_grad(), ModelProbe(model, {"layers.*.mixer_out": Where.at(3, 5), "norm": Where.of(1)}) as probe:
        model(Batch.from_lengths(TOKENS, [50, 25]))
    positions, values = probe.captures.of_sequence("layers.1.mixer_out", 1)
    assert positions == [3, 5] and values.shape == (2, CONFIG.hidden_size)
    assert probe.captures.places("layers.0.mixer_out") == [(0, 3), (0, 5), (1, 3), (1, 5)]
    assert len(probe.captures.values("norm")) == 25


def test_names_that_are_none_are_refused() -> None:
    model = make_model(CONFIG)
    with pytest.raises(UsageError, match="no tap is called"):
        ModelProbe(model, ["layers.0.attention.query"])
    with pytest.raises(UsageError, match="cannot be changed"):
        ModelProbe(model, edits=[Edit("layers.*.delta.update", torch.clone)])
    with pytest.raises(UsageError, match="logits"):
        ModelProbe(model, edits=[Edit("logits", torch.clone, Where.at(1))])


def test_common_edits() -> None:
    """Each by what it must do to the tensor behind it."""
    model = make_model(CONFIG)
    batch = Batch.from_lengths(TOKENS, [75])
    names = [
        "layers.0.router.*",
        "layers.0.experts.out",
        "layers.0.ffn_out",
        "layers.0.shared.*",
        "layers.1.residual_in",
    ]

    def run(*edits: Edit) -> dict[str, Tensor]:
        with torch.no_grad(), ModelProbe(model, names, edits=edits) as probe:
            model(batch)
        return {name.removeprefix("layers.0."): probe.captures.values(name) for name in probe.captures.names()}

    plain = run()
    experts_TA, weights_TA = plain["router.experts"], plain["router.weights"]
    busiest = int(experts_TA.flatten().bincount().argmax())
    silent = run(*silence_expert("layers.0", busiest))
    part_TD = (weights_TA * (experts_TA == busiest))[..., None] * plain["experts.out"]
    assert torch.allclose(silent["ffn_out"], plain["ffn_out"] - part_TD.sum(1), rtol=1e-3, atol=1e-5)
    is_free_T = ~(experts_TA == busiest).any(1)
    assert is_free_T.any() and same_bits(silent["ffn_out"][is_free_T], plain["ffn_out"][is_free_T])
    avoided = run(avoid_expert("layers.0", busiest))
    assert not (avoided["router.experts"] == busiest).any()
    assert torch.allclose(avoided["router.weights"].sum(-1), torch.ones(75))
    vector = torch.linspace(-1, 1, CONFIG.hidden_size)
    steered = run(steer("layers.0.residual_out", vector, strength=2.0))
    assert torch.equal(steered["layers.1.residual_in"], plain["layers.1.residual_in"] + 2 * vector)
    halved = run(scale("layers.0.residual_out", 0.5, where=Where.at(3)))
    assert torch.equal(halved["layers.1.residual_in"][3], plain["layers.1.residual_in"][3] / 2)
    moved = run(replace("layers.0.residual_out", plain["layers.1.residual_in"][7], where=Where.at(4, 5)))
    assert torch.equal(moved["layers.1.residual_in"][4:6], plain["layers.1.residual_in"][[7, 7]])
