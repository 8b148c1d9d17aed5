"""What was changed in one model is found where it was changed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from qnext.diagnostics.inside.divergence import Divergence, compare_passes
from qnext.diagnostics.inside.recording import RecordedPass, record_pass
from qnext.model import CausalLM
from tests.model.models import PEER_CONFIGS, make_in_form, make_model, random_tokens

CONFIG = PEER_CONFIGS["next, sizes of the native kernels"]
TOKENS = random_tokens(CONFIG, 40).tolist()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def recorded(model: CausalLM) -> RecordedPass:
    return record_pass(model, TOKENS)


def against(recorded: RecordedPass, other: CausalLM) -> Divergence:
    return compare_passes(recorded, record_pass(other, TOKENS), tolerance=1e-3)


def test_a_model_is_equal_to_itself(model: CausalLM, recorded: RecordedPass) -> None:
    found = against(RecordedPass.from_bytes(recorded.to_bytes()), deepcopy(model))
    assert found.is_exact and found.weights.are_none
    assert found.first_bits is None and found.first_beyond is None
    assert found.logits is not None and found.logits.mean_kl == 0 and found.logits.same_first == 1


# a tensor -> the first part that can see it
CHANGES = {
    "model.layers.0.input_layernorm.weight": "layers.0.mixer_in",
    "model.layers.1.linear_attn.A_log": "layers.1.delta.decay",
    "model.layers.1.linear_attn.dt_bias": "layers.1.delta.decay",
    "model.layers.2.linear_attn.conv1d.weight": "layers.2.delta.conv",
    "model.layers.2.linear_attn.norm.weight": "layers.2.delta.gated_out",
    "model.layers.2.linear_attn.out_proj.weight": "layers.2.mixer_out",
    "model.layers.3.self_attn.k_norm.weight": "layers.3.attention.key",
    "model.layers.1.mlp.gate.weight": "layers.1.router.logits",
    "model.layers.3.mlp.experts.down_proj": "layers.3.ffn_out",
    "model.layers.0.mlp.shared_expert_gate.weight": "layers.0.shared.gate",
    "model.norm.weight": "norm",
    "lm_head.weight": "logits",
    "model.embed_tokens.weight": "embedding",
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_bit_of_one_tensor_is_found(model: CausalLM, recorded: RecordedPass, name: str) -> None:
    """The bit of an exponent, of the number that the first token surely meets; and by its checksum the lowest bit."""
    other = deepcopy(model)
    weight = other.get_parameter(name).detach()
    row = TOKENS[0] if name.startswith("model.embed") else 0
    row = int(recorded.taps["layers.3.router.experts"][0, 0]) if ".experts." in name else row
    bits = weight[row : row + 1].view(-1)[:1].view(torch.int32)
    bits ^= 1 << 23
    found = against(recorded, other)
    assert found.first_bits is not None and found.first_bits.tap == CHANGES[name]
    assert found.weights.other_bits == (name,)
    assert not found.is_exact
    bits ^= 1 << 23 | 1
    assert against(recorded, other).weights.other_bits == (name,)


def test_precisions_and_forms(recorded: RecordedPass) -> None:
    low = against(recorded, make_model(CONFIG, dtype=torch.bfloat16))
    assert low.first_bits is not None and low.first_bits.tap == "embedding"
    assert len(low.weights.other_form) == len(recorded.weights) and not low.weights.only_a
    assert low.logits is not None and 0 < low.logits.mean_kl < 0.1
    packed = against(recorded, make_in_form("next, sizes of the native kernels", "int8-g32"))
    assert "model.layers.0.linear_attn.in_proj_qkvz.weight" in packed.weights.other_form
    assert not packed.weights.only_a and not packed.weights.only_b
    errors = [tap.relative for tap in packed.of_layers("residual_out")]
    assert len(errors) == 4 and 0 < min(errors) < max(errors) < 0.5
    assert packed.first_beyond is not None and packed.first_beyond.relative > 1e-3


def test_models_of_other_layers_are_compared_where_both_have_some(recorded: RecordedPass) -> None:
    shorter = make_model(CONFIG.with_layers(2))
    found = against(recorded, shorter)
    assert {name.split(".")[1] for name in found.only_a} == {"2", "3"} and not found.only_b
    assert any(name.startswith("model.layers.3.") for name in found.weights.only_a)
    assert not found.is_exact
