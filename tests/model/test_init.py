"""Initial values: the rules, and that each depends on seed and name alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from qnext.config import preset
from qnext.model import CausalLM, initialize
from qnext.model.init import fill_normal, initial_values
from qnext.planning import list_parameters

CONFIG = replace(preset("nano-5m"), vocab_size=500, num_experts=6, attention_bias=True, initializer_range=0.03)


def _initialised(seed: int = 0, **options: object) -> dict[str, torch.Tensor]:
    model = CausalLM(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, seed=seed, **options)  # type: ignore[arg-type]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_every_parameter_follows_its_rule() -> None:
    for name, values in _initialised().items():
        if name.endswith(".bias"):
            assert (values == 0).all(), name
        elif name.endswith("linear_attn.norm.weight"):
            assert (values == 1).all(), name
        elif "norm" in name:
            assert (values == 0).all(), name
        elif name.endswith("A_log"):
            assert ((values.exp() > 0) & (values.exp() < 16)).all() and values.unique().numel() > 1, name
        elif name.endswith("dt_bias"):
            dt = softplus(values)
            assert ((dt >= 0.999e-3) & (dt <= 0.1001)).all() and values.unique().numel() > 1, name
        else:
            # the deviation of n samples is itself known to 1 / sqrt(2 n); four of those
            tolerance = 4 / (2 * values.numel()) ** 0.5
            assert abs(values.std().item() / 0.03 - 1) < tolerance, name
            assert abs(values.mean().item()) < 4 * 0.03 / values.numel() ** 0.5, name


def test_plain_norms_start_at_one() -> None:
    config = replace(CONFIG, zero_centered_norm=False)
    for name in ("model.norm.weight", "model.layers.3.self_attn.q_norm.weight", "mtp.pre_fc_norm_hidden.weight"):
        assert (initial_values(config, list_parameters(config)[name], seed=0) == 1).all()


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    first = _initialised(seed=4)
    torch.manual_seed(2)
    again, other = _initialised(seed=4), _initialised(seed=5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    model, state = CausalLM(CONFIG), torch.get_rng_state()
    initialize(model, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("expert", [0, 5])
def test_an_expert_needs_no_neighbours(expert: int) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stacked = _initialised(seed=9)[name]
    alone = initial_values(CONFIG, list_parameters(CONFIG)[name], seed=9, expert=expert)
    assert torch.equal(alone, stacked[expert])


@pytest.mark.parametrize(
    "size", [1, 15, 17, 1 << 16, (1 << 16) + 5, (1 << 16) + 16, (3 << 16) + 39, (1 << 22) + 70_007]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_do_not_depend_on_the_pieces_in_which_they_are_drawn(size: int, dtype: torch.dtype) -> None:
    """Every seed means what it meant when chunks of 4M were drawn at once."""
    expected, drawn = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    generator = torch.Generator().manual_seed(size)
    for chunk in expected.split(1 << 22):
        chunk.copy_(torch.empty(chunk.shape).normal_(std=0.02, generator=generator))
    fill_normal(drawn, std=0.02, generator=torch.Generator().manual_seed(size))
    assert torch.equal(drawn, expected)
