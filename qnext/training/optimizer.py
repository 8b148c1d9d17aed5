"""Which parameter is updated how: the weight-decay table, AdamW and Muon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qnext.model import CausalLM, Experts, Router
from qnext.model.delta_net import GatedDeltaNet
from qnext.model.layers import GatedRMSNorm, RMSNorm
from qnext.training.config import TrainConfig

Algorithm = Literal["adamw", "muon"]

# Quintic iteration of Muon (Keller Jordan, 2024): steep at zero, so that small singular values grow fast; all end
# between about 0.7 and 1.2 rather than exactly at one.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


class ParameterRule(NamedTuple):
    """What happens to one parameter."""

    name: str
    parameter: nn.Parameter
    kind: str  # the line of the table that it belongs to
    has_decay: bool
    algorithm: Algorithm


class _Kind(NamedTuple):
    kind: str
    has_decay: bool
    is_matrix: bool  # Muon may have it


def _classify(owner: nn.Module, name: str, parameter: nn.Parameter) -> _Kind:
    """Decay pulls matrices to zero and zero-centred norms to a scale of one; a plain norm it would pull to zero."""
    if isinstance(owner, RMSNorm):
        if owner.zero_centered:
            return _Kind("zero-centred norm", True, False)
        return _Kind("plain norm", False, False)
    if isinstance(owner, GatedRMSNorm):
        return _Kind("DeltaNet output norm", False, False)
    if isinstance(owner, nn.Embedding):
        return _Kind("embedding", False, False)
    if isinstance(owner, nn.Conv1d):
        return _Kind("convolution", False, False)
    if isinstance(owner, GatedDeltaNet):
        return _Kind("A_log, dt_bias", False, False)
    if name == "bias":
        return _Kind("bias", False, False)
    if isinstance(owner, Experts):
        return _Kind("expert matrices", True, True)
    if isinstance(owner, Router):
        return _Kind("router", True, False)
    if isinstance(owner, nn.Linear):
        return _Kind("matrix", True, min(parameter.shape) > 1)
    raise AssertionError(f"no update rule for {type(owner).__name__}.{name}")


def parameter_rules(model: CausalLM, *, optimizer: Algorithm) -> list[ParameterRule]:
    """One rule per parameter that requires a gradient, tied ones once, in the order of the model.

    With "muon" the matrices inside layers are Muon's; embeddings, head, routers, norms, convolutions, vectors and
    the scalars of Gated DeltaNet stay with AdamW.
    """
    rules: list[ParameterRule] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            kind = _classify(module, name, parameter)
            if module is model.lm_head:
                kind = _Kind("head", True, False)
            algorithm: Algorithm = "muon" if optimizer == "muon" and kind.is_matrix else "adamw"
            full_name = f"{prefix}.{name}" if prefix else name
            rules.append(ParameterRule(full_name, parameter, kind.kind, kind.has_decay, algorithm))
    return rules


class DecayRow(NamedTuple):
    """One line of the weight-decay table."""

    kind: str
    has_decay: bool
    algorithm: Algorithm
    num_tensors: int
    num_parameters: int


def decay_table(rules: Sequence[ParameterRule]) -> list[DecayRow]:
    """The rules summed up by kind, algorithm and decay, in order of first appearance."""
    groups: dict[tuple[str, bool, Algorithm], list[ParameterRule]] = {}
    for rule in rules:
        groups.setdefault((rule.kind, rule.has_decay, rule.algorithm), []).append(rule)
    return [DecayRow(*key, len(group), sum(r.parameter.numel() for r in group)) for key, group in groups.items()]


@torch.no_grad()
def orthogonalize(matrices: Tensor, *, steps: int = _NEWTON_SCHULZ_STEPS) -> Tensor:
    """[..., rows, columns] -> matrices with the same singular vectors and singular values near one (0.7 to 1.2).

    Newton-Schulz maps X to (a + b G + c G^2) X with G = X X^T. The polynomials of all steps commute, so they are
    multiplied up on the small side and X is touched twice only: half the time, and as exact in fp32.
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

    Every matrix of the last two dims is orthogonalised on its own, those of one shape together. The step is scaled
    by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step (arXiv 2502.16982), so both share a
    learning rate. Weight decay is decoupled.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape[-2:], []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        rows, columns = parameters[0].shape[-2:]
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1.0 - momentum)
        directions = torch._foreach_lerp(gradients, buffers, momentum)
        stacked = torch.cat([direction.reshape(-1, rows, columns) for direction in directions])
        updates = orthogonalize(stacked).split([p.numel() // (rows * columns) for p in parameters])
        torch._foreach_mul_(parameters, 1.0 - lr * weight_decay)
        scale = -lr * 0.2 * max(rows, columns) ** 0.5
        shaped = [update.reshape(p.shape) for update, p in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=scale)


def make_optimizers(rules: Sequence[ParameterRule], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, then Muon where a rule asks for it; each with a decayed and an undecayed group.

    `lr_scale` of a group is its learning rate over that of the schedule.
    """
    optimizers: list[torch.optim.Optimizer] = []
    adamw = _groups(rules, "adamw", config.weight_decay)
    if adamw:
        betas = (config.beta1, config.beta2)
        optimizers.append(torch.optim.AdamW(adamw, lr=config.lr, betas=betas, eps=config.eps, fused=True))
    muon = _groups(rules, "muon", config.weight_decay)
    if muon:
        for group in muon:
            group["lr_scale"] = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
        optimizers.append(Muon(muon, lr=config.lr, momentum=config.muon_momentum, weight_decay=config.weight_decay))
    return optimizers


def _groups(rules: Sequence[ParameterRule], algorithm: Algorithm, weight_decay: float) -> list[dict[str, Any]]:
    groups = []
    for has_decay in (True, False):
        parameters = [r.parameter for r in rules if r.algorithm == algorithm and r.has_decay == has_decay]
        if parameters:
            groups.append({"params": parameters, "weight_decay": weight_decay if has_decay else 0.0})
    return groups


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], rules: Sequence[ParameterRule]) -> dict[str, Tensor]:
    """The state of all optimisers as `<parameter name>/<key>`; load_optimizer_tensors is its inverse."""
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
    """Put back what optimizer_tensors gave. Parameters without an entry start anew, as before their first step."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    by_name = {rule.name: rule.parameter for rule in rules}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = by_name[name]
        device = value.device if key == "step" else parameter.device
        owners[id(parameter)].state[parameter][key] = value.to(device)
