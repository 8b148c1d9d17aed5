"""The model by itself: sizes, switches, initialisation, causality."""

from __future__ import annotations

import copy

import pytest
import torch

from model.models import MOE, PEER_CONFIGS, F, L, logits_of, make_model, next_config, plain_config, random_tokens
from qnext.config import FULL_ATTENTION, ModelConfig, preset
from qnext.model import Batch, CausalLM, Experts, Router, initialize
from qnext.model.delta_net import GatedDeltaNet


def test_the_released_model_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = CausalLM(preset("80b-a3b"))
    mtp = sum(p.numel() for name, p in model.named_parameters() if name.startswith("mtp."))
    trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert trunk == 79_674_391_296
    assert mtp == 1_650_471_424


def test_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in CausalLM(preset("80b-a3b")).state_dict().items()}
    expected = {
        "model.embed_tokens.weight": (151936, 2048),
        "lm_head.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        "model.layers.0.linear_attn.in_proj_qkvz.weight": (12288, 2048),
        "model.layers.0.linear_attn.in_proj_ba.weight": (64, 2048),
        "model.layers.0.linear_attn.conv1d.weight": (8192, 1, 4),
        "model.layers.0.linear_attn.A_log": (32,),
        "model.layers.0.linear_attn.dt_bias": (32,),
        "model.layers.0.linear_attn.norm.weight": (128,),
        "model.layers.0.linear_attn.out_proj.weight": (2048, 4096),
        "model.layers.3.self_attn.q_proj.weight": (8192, 2048),
        "model.layers.3.self_attn.k_proj.weight": (512, 2048),
        "model.layers.3.self_attn.o_proj.weight": (2048, 4096),
        "model.layers.3.self_attn.q_norm.weight": (256,),
        "model.layers.47.mlp.gate.weight": (512, 2048),
        "model.layers.47.mlp.shared_expert.down_proj.weight": (2048, 512),
        "model.layers.47.mlp.shared_expert_gate.weight": (1, 2048),
        "mtp.fc.weight": (2048, 4096),
        "mtp.pre_fc_norm_embedding.weight": (2048,),
        "mtp.pre_fc_norm_hidden.weight": (2048,),
        "mtp.norm.weight": (2048,),
        "mtp.layers.0.self_attn.v_proj.weight": (512, 2048),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert sum(name.startswith("mtp.") and "experts." not in name for name in shapes) == 17


ABLATIONS = {
    "no output gate": next_config(attention_output_gate=False),
    "plain norms": next_config(zero_centered_norm=False),
    "no shared expert": next_config(shared_expert_intermediate_size=0),
    "dense": next_config(num_experts=0),
    "dense with MTP": next_config(num_experts=0, num_nextn_predict_layers=1),
    "MTP before the final norm": next_config(num_nextn_predict_layers=1, mtp_uses_final_norm=False),
    "full attention first": next_config(layer_types=(F, L, L)),
    "Qwen3 with linear layers": plain_config(
        **MOE,
        layer_types=(L, F),
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=3,
    ),
    "conv of width one": next_config(linear_conv_kernel_dim=1),
}


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_every_switch_trains(name: str) -> None:
    """Every parameter of every ablation gets a finite gradient that is not zero."""
    config = ABLATIONS[name]
    model = make_model(config)
    tokens = random_tokens(config, 40)
    batch = Batch.from_lengths(tokens[:-1], [39])
    trunk = model(batch)
    loss = torch.nn.functional.cross_entropy(model.logits(trunk.hidden_TD), tokens[1:])
    if model.mtp is not None:
        drafts = model.logits(model.draft_hidden(tokens[1:], trunk, batch))
        loss = loss + torch.nn.functional.cross_entropy(drafts[:-1], tokens[2:])
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


def test_a_switch_changes_the_result() -> None:
    tokens = random_tokens(next_config(), 20)
    with torch.no_grad():
        base = make_model(next_config())
        ungated = make_model(next_config(attention_output_gate=False))
        plain = make_model(next_config(zero_centered_norm=False))
        plain.load_state_dict(base.state_dict())
        assert "model.layers.3.self_attn.q_proj.weight" in ungated.state_dict()
        assert ungated.model.layers[3].self_attn.q_proj.out_features == 6 * 16
        assert not torch.allclose(logits_of(base, tokens), logits_of(plain, tokens), atol=0.1)


@pytest.mark.parametrize("rule", ["log_uniform", "ones"])
def test_time_constants(rule: str) -> None:
    """dt lies in [1e-3, 0.1] for the rule that trains from scratch; A never is zero, so its log is finite."""
    config = next_config(
        linear_num_key_heads=64,
        linear_num_value_heads=512,
        linear_key_head_dim=2,
        hidden_size=4,
        linear_value_head_dim=2,
    )
    model = CausalLM(config)
    initialize(model, seed=0, time_constants=rule)  # type: ignore[arg-type]
    mixers = [module for module in model.modules() if isinstance(module, GatedDeltaNet)]
    decays = torch.cat([mixer.A_log.detach().exp() for mixer in mixers])
    assert decays.isfinite().all()
    assert decays.min() > 0
    assert 6.0 < decays.mean() < 10.0
    steps = torch.nn.functional.softplus(torch.cat([mixer.dt_bias.detach() for mixer in mixers]))
    if rule == "ones":
        assert torch.allclose(steps, torch.nn.functional.softplus(torch.ones(())))
    else:
        assert 0.999e-3 < steps.min() < 1.5e-3
        assert 0.07 < steps.max() < 0.1001
        assert abs(steps.log().mean().item() - torch.tensor([1e-3, 0.1]).log().mean().item()) < 0.2


def test_router_rows_have_one_length() -> None:
    config = next_config()
    model = CausalLM(config)
    initialize(model, seed=0)
    for module in model.modules():
        if isinstance(module, Router):
            lengths = module.weight.norm(dim=1)
            assert torch.allclose(lengths, torch.full_like(lengths, config.initializer_range * 48**0.5), rtol=1e-5)
    initialize(model, seed=0, normalize_router=False)
    lengths = model.model.layers[0].mlp.gate.weight.norm(dim=1)
    assert lengths.max() > 1.01 * lengths.min()


@pytest.mark.parametrize("config", [next_config(num_nextn_predict_layers=1), plain_config(attention_bias=True)])
def test_initial_values(config: ModelConfig) -> None:
    """Nothing is left as it was allocated; scales are one and matrices have the config's deviation."""
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, seed=5)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    scale = 0.0 if config.zero_centered_norm else 1.0
    assert (model.model.norm.weight == scale).all()
    assert (model.model.layers[-1].self_attn.q_norm.weight == scale).all()
    assert abs(model.model.embed_tokens.weight.std() / config.initializer_range - 1) < 0.1
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            assert (module.norm.weight == 1).all()
        if isinstance(module, Experts):
            assert abs(module.down_proj.std() / config.initializer_range - 1) < 0.1


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(123)
    expected_next = torch.rand(3)
    models = [CausalLM(next_config()) for _ in range(3)]
    torch.manual_seed(123)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialize(model, seed=seed)
    assert torch.equal(torch.rand(3), expected_next)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    random_names = [name for name in first if "norm" not in name]
    assert not any(torch.equal(first[name], other[name]) for name in random_names)


def test_a_tied_head_is_one_tensor_and_survives_a_copy() -> None:
    model = make_model(next_config(tie_word_embeddings=True))
    twin = copy.deepcopy(model)
    for each in (model, twin):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(set(model.parameters()))


@pytest.mark.parametrize("name", ["next", "next, YaRN, wide conv"])
@torch.no_grad()
def test_a_model_that_was_built_without_storage_rotates_as_any_other(name: str) -> None:
    """`to_empty` fills whatever it reaches with garbage; rotary frequencies are not in the checkpoint to mend it."""
    config = PEER_CONFIGS[name]
    direct = make_model(config)
    with torch.device("meta"):
        empty = CausalLM(config)
    empty.to_empty(device="cpu").load_state_dict(direct.state_dict())
    with torch.device("meta"):
        assigned = CausalLM(config)
    assigned.load_state_dict(copy.deepcopy(direct.state_dict()), assign=True)
    tokens = random_tokens(config, 30)
    expected = logits_of(direct, tokens)
    assert torch.equal(logits_of(empty, tokens), expected)
    assert torch.equal(logits_of(assigned, tokens), expected)


@torch.no_grad()
def test_a_cast_does_not_round_the_frequencies() -> None:
    model = make_model(next_config(partial_rotary_factor=1.0))
    positions = torch.tensor([0, 100_000])
    before = model.model.rotary(positions)
    after = model.to(torch.bfloat16).float().model.rotary(positions)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert "rotary" not in " ".join(model.state_dict())


def test_a_token_never_sees_its_future() -> None:
    config = next_config(layer_types=(L, F, L, FULL_ATTENTION))
    model = make_model(config, dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    model.model.embed_tokens.register_forward_hook(keep)
    logits_of(model, random_tokens(config, 90))[66].sum().backward()
    grad_TD = seen[0].grad
    assert grad_TD is not None
    assert (grad_TD[67:] == 0).all()
    assert (grad_TD[:67].abs().sum(-1) > 0).all()
