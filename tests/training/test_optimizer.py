from __future__ import annotations

import pytest
import torch

from qnext.training import TrainConfig, decay_table, parameter_rules
from qnext.training.optimizer import (
    Muon,
    load_optimizer_tensors,
    make_optimizers,
    optimizer_tensors,
    orthogonalize,
)
from tests.training.models import tiny_model

CONFIG = TrainConfig(lr=1e-2, tokens_per_batch=8, sequence_length=8, total_steps=10)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False}, {"zero_centered_norm": False, "attention_bias": True}]
)
def test_every_parameter_is_in_exactly_one_group(optimizer: str, changes: dict[str, bool]) -> None:
    model = tiny_model(**changes)
    rules = parameter_rules(model, optimizer=optimizer)  # type: ignore[arg-type]
    expected = {name for name, _ in model.named_parameters()}
    assert [rule.name for rule in rules] == list({rule.name: None for rule in rules})
    assert {rule.name for rule in rules} == expected
    optimizers = make_optimizers(rules, CONFIG)
    grouped = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert sum(row.num_parameters for row in decay_table(rules)) == sum(p.numel() for p in model.parameters())


def test_weight_decay_table() -> None:
    def has_decay(**changes: bool) -> dict[str, bool]:
        return {rule.name: rule.has_decay for rule in parameter_rules(tiny_model(**changes), optimizer="adamw")}

    decay = has_decay(tie_word_embeddings=False, attention_bias=True)
    layer = "model.layers.0."
    assert {name for name, wanted in decay.items() if not wanted and name.startswith(layer)} == {
        layer + "linear_attn." + name for name in ("A_log", "dt_bias", "conv1d.weight", "norm.weight")
    }
    attention = "model.layers.1.self_attn."
    assert not decay[attention + "q_proj.bias"] and decay[attention + "q_proj.weight"]
    assert decay[attention + "q_norm.weight"] and decay["model.norm.weight"] and decay["mtp.norm.weight"]
    assert not decay["model.embed_tokens.weight"] and decay["lm_head.weight"]
    assert decay[layer + "mlp.gate.weight"] and decay[layer + "mlp.experts.down_proj"]
    plain = has_decay(zero_centered_norm=False)
    assert not plain["model.norm.weight"] and not plain[attention + "q_norm.weight"]


def test_what_muon_gets() -> None:
    rules = parameter_rules(tiny_model(tie_word_embeddings=False), optimizer="muon")
    muon = {rule.name for rule in rules if rule.algorithm == "muon"}
    for name in ("linear_attn.in_proj_qkvz.weight", "linear_attn.out_proj.weight", "mlp.experts.gate_up_proj"):
        assert "model.layers.0." + name in muon
    assert "mtp.fc.weight" in muon
    for part in ("embed_tokens", "lm_head", "conv1d", "A_log", "dt_bias", "norm", "mlp.gate.", "shared_expert_gate"):
        assert not any(part in name for name in muon), part


@pytest.mark.parametrize("shape", [(3, 16, 24), (24, 16), (2, 3, 9, 9)])
def test_orthogonalize_keeps_vectors_and_sets_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor(1e-3)
    out = orthogonalize(matrices)
    assert out.shape == matrices.shape
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    core = u.mT @ out @ vh.mT
    off_diagonal = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(2, 20, 32), (2, 33, 20)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_orthogonalize_equals_the_plain_iteration(shape: tuple[int, int, int], rank: int) -> None:
    """In fp32 against fp64, for gradients of few tokens too, whose other singular values are zero."""
    torch.manual_seed(0)
    matrices = torch.randn(shape[0], shape[1], rank) @ torch.randn(shape[0], rank, shape[2])
    x = matrices.double() / matrices.double().norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    error = (orthogonalize(matrices) - x).norm() / x.norm()
    # Five steps multiply a rounding error of fp32 by up to 3.4^5, about 500.
    assert error < 500 * torch.finfo(torch.float32).eps * 10


def test_orthogonalize_of_zero_is_zero() -> None:
    assert orthogonalize(torch.zeros(2, 5, 3)).abs().max() == 0


def test_muon_step_by_hand() -> None:
    torch.manual_seed(0)
    # Two matrices of one shape and a stack of it: they are orthogonalised together and must not mix.
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 4), (3, 6, 4), (6, 4))]
    expected = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in expected]
    optimizer = Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p)
            momenta[i] = 0.9 * momenta[i] + 0.1 * p.grad
            direction = orthogonalize(0.1 * p.grad + 0.9 * momenta[i])
            expected[i] = expected[i] * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 6**0.5 * direction
        optimizer.step()
    for p, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    still, moved = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4, 3))
    moved.grad = torch.ones(4, 3)
    Muon([still, moved], lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert still.eq(1).all() and moved.ne(1).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_round_trip(name: str) -> None:
    config = CONFIG.with_(optimizer=name)

    def build() -> tuple[torch.nn.Module, list, list]:
        model = tiny_model()
        rules = parameter_rules(model, optimizer=config.optimizer)
        return model, rules, make_optimizers(rules, config)

    def step(model: torch.nn.Module, optimizers: list, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()

    model, rules, optimizers = build()
    step(model, optimizers, 1)
    other, other_rules, other_optimizers = build()
    other.load_state_dict(model.state_dict())
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizers, rules).items()}
    load_optimizer_tensors(other_optimizers, other_rules, saved)
    step(model, optimizers, 2)
    step(other, other_optimizers, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
