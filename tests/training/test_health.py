"""The signs of trouble are what they are called, and looking for them changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from qnext.training import Hooks, StepMetrics, parameter_rules
from qnext.training.health import Health, HealthProbe
from tests.model.models import OneRequest, random_tokens
from tests.training.models import documents, tiny_model
from tests.training.test_loop import CONFIG, make_trainer

ONE = CONFIG.with_(accumulation=1, total_steps=1)


def first_step(config=ONE, model=None, **options) -> tuple[StepMetrics, Health]:  # type: ignore[no-untyped-def]
    seen: list[StepMetrics] = []
    make_trainer(config, model=model, hooks=Hooks(on_step=seen.append), **options).run()
    assert seen[0].health is not None
    return seen[0], seen[0].health


@pytest.mark.parametrize("parallel", [1, 2])
def test_looking_changes_no_bit(parallel: int) -> None:
    models = []
    for every in (0, 1):
        model = tiny_model()
        config = CONFIG.with_(accumulation=2, parallel_batches=parallel, total_steps=2, health_every=every)
        make_trainer(config, model=model).run()
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in models[1].modules())


def test_numbers_of_a_step() -> None:
    model = tiny_model()
    hidden = []
    handle = model.model.layers[1].register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    metrics, health = first_step(model=model)
    handle.remove()
    assert math.hypot(*health.grad_norms.values()) == pytest.approx(metrics.grad_norm, rel=1e-4)
    assert health.largest_grad_of in dict(model.named_parameters())
    assert health.largest_grad <= metrics.grad_norm
    rms = float(hidden[0].square().mean().sqrt())
    assert health.activation_rms[1] == pytest.approx(rms, rel=1e-4)
    assert health.activation_peak[1] == pytest.approx(float(hidden[0].abs().max()) / rms, rel=1e-4)
    assert [len(values) for values in (health.activation_rms, health.activation_peak, health.router_entropy)] == [3] * 3
    assert all(0.0 < each <= 1.0 for each in health.router_entropy)
    assert metrics.experts is not None and [sum(each) for each in metrics.experts.load] == [96, 96, 96]


def test_an_outlier_is_found_and_named() -> None:
    model = tiny_model()
    name = "model.layers.0.mlp.shared_expert.up_proj.weight"

    def spike(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[3, 4] = -1e6
        return grad

    model.get_parameter(name).register_hook(spike)
    _, health = first_step(model=model)
    assert (health.largest_grad, health.largest_grad_of) == (1e6, name)
    assert max(health.grad_norms, key=health.grad_norms.__getitem__) == "matrix"


def test_the_state_is_that_of_a_cache() -> None:
    model = tiny_model()
    tokens_T, mixer = random_tokens(model.config, 30), model.model.layers[0].linear_attn
    rows = []
    mixer.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    with torch.no_grad():
        request = OneRequest(model, 30)
        model(request.batch(tokens_T))
        g_RH, state_HKV = mixer.follow(rows[0])
    torch.testing.assert_close(state_HKV, request.delta[0].state[1], rtol=1e-4, atol=1e-5)
    assert g_RH.shape == (30, 4)


def test_memory_of_heads() -> None:
    model = tiny_model()
    mixer = model.model.layers[0].linear_attn
    with torch.no_grad():
        mixer.in_proj_ba.weight.zero_()
        mixer.dt_bias.zero_()
        # softplus(0) = ln 2, so a half-life is exp(-A_log) tokens
        mixer.A_log.copy_(-torch.tensor([0.5, 15.0, 17.0, 1000.0]).log())
    _, health = first_step(model=model, docs=documents([40]))
    assert health.decay[0] == pytest.approx([0.25, 2 ** (-1 / 15), 2 ** (-1 / 17), 2 ** (-1 / 1000)], rel=1e-4)
    assert health.long_memory == [0.5] and health.delta_layers == [0]


def test_a_step_that_asks_the_model_nothing_is_healthy() -> None:
    model = tiny_model()
    with HealthProbe(model) as probe:
        health = probe.health(parameter_rules(model, optimizer="adamw"))
    assert health.activation_rms == health.decay == [] and (health.grad_norms, health.largest_grad) == ({}, 0.0)


def test_it_is_written_now_and_then(tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    config = CONFIG.with_(accumulation=1, total_steps=7, health_every=3, expert_stats_every=2)
    make_trainer(config, folder=tmp_path, hooks=Hooks(on_step=seen.append)).run()
    assert [step.step for step in seen if step.health is not None] == [1, 3, 6]
    assert [step.step for step in seen if step.experts is not None] == [1, 2, 4, 6]
