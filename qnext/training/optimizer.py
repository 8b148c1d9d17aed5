"""How each parameter is updated: the weight-decay table, AdamW and Muon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qnext.lora import lora_parameters
from qnext.model import CausalLM
from qnext.planning import Kind, list_parameters
from qnext.planning.parameters import NORMS
from qnext.training.config import TrainConfig
from qnext.training.ranks import ALONE, TrainingRanks

Algorithm = Literal["adamw", "muon"]

# Quintic iteration of Muon (Keller Jordan, 2024): steep at zero, so that small singular values grow fast; all end
# between about 0.7 and 1.2 rather than exactly at one.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class ParameterRule(NamedTuple):
    """How one parameter is updated."""

    name: str
    parameter: nn.Parameter
    kind: str  # the line of the table that it belongs to
    has_decay: bool
    algorithm: Algorithm


class _UpdateRule(NamedTuple):
    """What the parameters of a kind are called in the table, and how they are updated."""

    label: str
    has_decay: bool
    is_matrix: bool = False  # Muon may have it


# Decay pulls matrices to zero and zero-centred norms to a scale of one; a plain norm it would pull to zero.
_ZERO_CENTRED, _PLAIN = _UpdateRule("zero-centred norm", True), _UpdateRule("plain norm", False)
_MATRIX = _UpdateRule("matrix", True, is_matrix=True)
_SCALARS = _UpdateRule("A_log, dt_bias", False)
_EXPERTS = _UpdateRule("expert matrices", True, is_matrix=True)
_UPDATES = {
    Kind.EMBEDDING: _UpdateRule("embedding", False),
    Kind.HEAD: _UpdateRule("head", True),
    Kind.BIAS: _UpdateRule("bias", False),
    Kind.CONVOLUTION: _UpdateRule("convolution", False),
    Kind.A_LOG: _SCALARS,
    Kind.DT_BIAS: _SCALARS,
    Kind.DELTA_NORM: _UpdateRule("DeltaNet output norm", False),
    Kind.ROUTER: _UpdateRule("router", True),
    Kind.EXPERTS_GATE_UP: _EXPERTS,
    Kind.EXPERTS_DOWN: _EXPERTS,
}


def parameter_rules(model: CausalLM, *, optimizer: Algorithm) -> list[ParameterRule]:
    """One rule per parameter that requires a gradient, tied parameters once, in the order of the model.

    With "muon" the matrices inside layers belong to Muon. Embeddings, head, routers, norms, convolutions, vectors and
    the scalars of Gated DeltaNet stay with AdamW, and so do the factors of an adapter.
    """
    infos = list_parameters(model.config)
    norm = _ZERO_CENTRED if model.config.zero_centered_norm else _PLAIN
    updates = _UPDATES | dict.fromkeys(NORMS, norm)
    factors = lora_parameters(model)
    rules: list[ParameterRule] = []
    for name, parameter in model.named_parameters():
        if name in factors:
            rules.append(ParameterRule(name, parameter, "LoRA factors", False, "adamw"))
        elif parameter.requires_grad:
            assert name in infos, f"no update rule for {name}"
            update = updates.get(infos[name].kind, _MATRIX)
            is_matrix = update.is_matrix and min(parameter.shape[-2:]) > 1
            algorithm: Algorithm = "muon" if optimizer == "muon" and is_matrix else "adamw"
            rules.append(ParameterRule(name, parameter, update.label, update.has_decay, algorithm))
    return rules


class DecayRow(NamedTuple):
    """One line of the weight-decay table."""

    kind: str
    has_decay: bool
    algorithm: Algorithm
    num_tensors: int
    num_parameters: int


def decay_table(rules: Sequence[ParameterRule]) -> list[DecayRow]:
    """The rules, summed up by kind, algorithm and decay, in order of first appearance."""
    groups: dict[tuple[str, bool, Algorithm], list[ParameterRule]] = {}
    for rule in rules:
        groups.setdefault((rule.kind, rule.has_decay, rule.algorithm), []).append(rule)
    return [DecayRow(*key, len(group), sum(r.parameter.numel() for r in group)) for key, group in groups.items()]


@torch.no_grad()
def orthogonalize(matrices: Tensor, *, steps: int = _NEWTON_SCHULZ_STEPS) -> Tensor:
    """[..., rows, columns] -> matrices with the same singular vectors and singular values near one (0.7 to 1.2).

    Newton-Schulz maps X to (a + b G + c G^2) X with G = X X^T. The polynomials of all steps commute. So they are
    multiplied on the small side first, and X is read only twice. This takes half the time and is as exact in fp32.
    """
    assert steps >= 1
    a, b, c = _NEWTON_SCHULZ
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    gram = x.mT @ x if is_tall else x @ x.mT
    product = _polynomial(gram, a, b, c)
    step = product
    for _ in range(steps - 1):
        gram = step @ gram @ step
        step = _polynomial(gram, a, b, c)
        product = step @ product
    x = x @ product if is_tall else product @ x
    return x.view(matrices.shape)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b G + c G^2"""
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalised (Muon), for matrices and stacks of matrices.

    Every matrix of the last two dims is orthogonalised on its own; matrices of one shape are computed together. The
    step is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (arXiv 2502.16982). So both
    optimisers share a learning rate. Weight decay is decoupled. Of a parameter that is cut among processes, each has
    some rows of a matrix, or some matrices of a stack.
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float, weight_decay: float, ranks: TrainingRanks = ALONE
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, bool], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = self._ranks.shape(parameter)
                    by_shape.setdefault((shape[-2:], len(shape) > 2), []).append(parameter)
            for (size, is_stack), parameters in by_shape.items():
                self._update(parameters, size, is_stack, group)

    def _update(self, parameters: list[Tensor], size: torch.Size, is_stack: bool, group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - group["momentum"])
        directions = list(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        if not is_stack:
            directions = self._ranks.whole(directions, parameters)
        stacked = torch.cat([direction.reshape(-1, *size) for direction in directions])
        updates = orthogonalize(stacked).split([each.numel() // size.numel() for each in directions])
        torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
        shaped = [update.reshape(each.shape) for update, each in zip(updates, directions, strict=True)]
        if not is_stack:
            shaped = [self._ranks.cut(update, p) for update, p in zip(shaped, parameters, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=-group["lr"] * 0.2 * max(size) ** 0.5)


def make_optimizers(
    rules: Sequence[ParameterRule], config: TrainConfig, ranks: TrainingRanks = ALONE
) -> list[torch.optim.Optimizer]:
    """AdamW, then Muon where a rule asks for it. Each has a group with decay and a group without.

    `lr_scale` of a group is its learning rate divided by that of the schedule.
    """
    optimizers: list[torch.optim.Optimizer] = []
    adamw = _groups(rules, "adamw", config.weight_decay)
    if adamw:
        betas = (config.beta1, config.beta2)
        optimizers.append(torch.optim.AdamW(adamw, lr=config.lr, betas=betas, eps=config.eps, fused=True))
    muon = _groups(rules, "muon", config.weight_decay)
    if muon:
        for group in muon:
            group["lr_scale"] = lr_scale("muon", config)
        options = {"momentum": config.muon_momentum, "weight_decay": config.weight_decay}
        optimizers.append(Muon(muon, lr=config.lr, ranks=ranks, **options))
    return optimizers


def lr_scale(algorithm: Algorithm, config: TrainConfig) -> float:
    """The learning rate of an optimiser over that of the schedule."""
    return config.muon_lr / config.lr if algorithm == "muon" and config.muon_lr is not None else 1.0


def _groups(rules: Sequence[ParameterRule], algorithm: Algorithm, weight_decay: float) -> list[dict[str, Any]]:
    groups = []
    for has_decay in (True, False):
        parameters = [r.parameter for r in rules if r.algorithm == algorithm and r.has_decay == has_decay]
        if parameters:
            groups.append({"params": parameters, "weight_decay": weight_decay if has_decay else 0.0})
    return groups


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], rules: Sequence[ParameterRule]) -> dict[str, Tensor]:
    """The state of all optimisers as `<parameter name>/<key>`. load_optimizer_tensors is the inverse."""
    names = {id(rule.parameter): rule.name for rule in rules}
    return {
        f"{names[id(parameter)]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], rules: Sequence[ParameterRule], tensors: dict[str, Tensor]
) -> None:
    """Restore the result of optimizer_tensors. Parameters without an entry start as before their first step."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    by_name = {rule.name: rule.parameter for rule in rules}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = by_name[name]
        device = value.device if key == "step" else parameter.device
        owners[id(parameter)].state[parameter][key] = value.to(device)
