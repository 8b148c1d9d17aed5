"""Signs of trouble in a step: gradients by kind, activations, states and decays of Gated DeltaNet, routers.

Legend: T tokens, R rows that are looked at, D hidden, E experts, H value heads, K and V head dims.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qnext.model import Batch, CausalLM, RouterOutput, SparseMoE
from qnext.model.delta_net import GatedDeltaNet
from qnext.training.optimizer import ParameterRule
from qnext.training.ranks import ALONE, TrainingRanks

_ROWS = 256  # of a router, and of the longest document where a state is followed
_LONG = 16  # tokens: the half-life of a head with a long memory


@dataclass(frozen=True)
class Health:
    """What a step looked like inside. Lists of layers are in their order, an MTP layer that ran last.

    Activations, states and routers are those of one micro batch; gradients those of the step, before clipping.
    """

    grad_norms: dict[str, float]  # by kind of parameter, as in the table of decay rules
    largest_grad: float  # the largest absolute value of a gradient
    largest_grad_of: str  # the parameter that it belongs to
    activation_rms: list[float]  # after each layer
    activation_peak: list[float]  # the largest absolute value over the root mean square
    router_entropy: list[float]  # of each router: mean over tokens, over its largest possible value ln E
    delta_layers: list[int]  # indices of the Gated DeltaNet layers, which the lists below follow
    state_norm: list[float]  # of the head whose state is largest, after up to 256 tokens
    decay: list[list[float]]  # of each head: the mean factor of a state per token
    long_memory: list[float]  # the share of heads whose state has a half-life above 16 tokens


class _DeltaSigns(NamedTuple):
    state_H: Tensor  # norm
    log_decay_H: Tensor  # mean


class HealthProbe:
    """Looks at a model in one step of training, as a context around its forward passes; `health` is read after the
    backward ones.

    It hooks whole layers, mixers and routers, so every op runs as without it. It waits for no number before `health`.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._layers = [*model.model.layers, *(() if model.mtp is None else model.mtp.layers)]
        self._activations: dict[int, Tensor] = {}  # rms and peak
        self._entropies: dict[int, Tensor] = {}
        self._deltas: dict[int, _DeltaSigns] = {}
        self._handles: list[RemovableHandle] = []
        self._thread: int | None = None

    def __enter__(self) -> HealthProbe:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(partial(self._see_layer, index)))
            for module in layer.children():
                if isinstance(module, GatedDeltaNet):
                    self._handles.append(module.register_forward_pre_hook(partial(self._see_delta, index)))
                elif isinstance(module, SparseMoE):
                    self._handles.append(module.gate.register_forward_hook(partial(self._see_router, index)))
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()

    def watch_thread(self) -> None:
        """The micro batch that the calling thread computes next is the one that is looked at."""
        self._thread = threading.get_ident()

    def _is_seen(self, index: int, seen: dict[int, Any]) -> bool:
        """The first pass of the thread counts: layers that are recomputed, and later micro batches, come again."""
        return index in seen or not torch.is_grad_enabled() or self._thread != threading.get_ident()

    def _see_layer(self, index: int, module: nn.Module, inputs: Any, hidden_TD: Tensor) -> None:
        if not self._is_seen(index, self._activations):
            x_TD = hidden_TD.detach()
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            rms = torch.linalg.vector_norm(x_TD, dtype=wide) / math.sqrt(x_TD.numel())
            self._activations[index] = torch.stack([rms, torch.linalg.vector_norm(x_TD, math.inf).to(wide)])

    def _see_router(self, index: int, module: nn.Module, inputs: Any, output: RouterOutput) -> None:
        if not self._is_seen(index, self._entropies):
            log_probs_RE = output.logits_TE.detach()[:_ROWS].float().log_softmax(-1)
            most = math.log(max(2, log_probs_RE.shape[-1]))
            self._entropies[index] = -(log_probs_RE.exp() * log_probs_RE).sum(-1).mean() / most

    def _see_delta(self, index: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._is_seen(index, self._deltas):
            assert isinstance(module, GatedDeltaNet)
            x_TD, batch = inputs
            with torch.no_grad():
                g_RH, state_HKV = module.follow(_longest(x_TD, batch))
            self._deltas[index] = _DeltaSigns(torch.linalg.vector_norm(state_HKV, dim=(1, 2)), g_RH.mean(0))

    @torch.no_grad()
    def health(self, rules: Sequence[ParameterRule], ranks: TrainingRanks = ALONE) -> Health:
        """Of the parts of the parameters, whose gradients add up over all processes."""
        norms, largest, name = _gradients(rules, ranks)
        seen = [self._activations[i] for i in sorted(self._activations)]
        rms, peaks = torch.stack(seen).unbind(1) if seen else torch.empty(2, 0)
        deltas = [self._deltas[i] for i in sorted(self._deltas)]
        return Health(
            grad_norms=norms,
            largest_grad=largest,
            largest_grad_of=name,
            activation_rms=_short(rms),
            activation_peak=_short(peaks / rms.clamp_min(1e-30)),
            router_entropy=[_short(self._entropies[i]) for i in sorted(self._entropies)],
            delta_layers=sorted(self._deltas),
            state_norm=[_short(each.state_H.max()) for each in deltas],
            decay=[_short(each.log_decay_H.exp()) for each in deltas],
            long_memory=[_short((each.log_decay_H > -math.log(2.0) / _LONG).float().mean()) for each in deltas],
        )


def _longest(x_TD: Tensor, batch: Batch) -> Tensor:
    """[R, D]: the first rows of the longest sequence."""
    lengths = batch.packing.lengths
    number = max(range(len(lengths)), key=lengths.__getitem__)
    start = sum(lengths[:number])
    return x_TD.detach()[start : start + min(_ROWS, lengths[number])]


def _gradients(rules: Sequence[ParameterRule], ranks: TrainingRanks) -> tuple[dict[str, float], float, str]:
    """The norm of each kind, and the largest value with its parameter."""
    with_grad = [(rule, rule.parameter.grad) for rule in rules if rule.parameter.grad is not None]
    if not with_grad:
        return {}, 0.0, ""
    grads = [grad for _, grad in with_grad]
    squares_P = ranks.gather_parts(torch.stack(torch._foreach_norm(grads)).double()).square().sum(0)
    peaks_P = ranks.gather_parts(torch.stack(_peaks(grads))).amax(0)
    squares: dict[str, float] = {}
    for (rule, _), square in zip(with_grad, squares_P.tolist(), strict=True):
        squares[rule.kind] = squares.get(rule.kind, 0.0) + square
    largest = int(peaks_P.argmax())
    norms = {kind: _digits(math.sqrt(square)) for kind, square in squares.items()}
    return norms, _digits(float(peaks_P[largest])), with_grad[largest][0].name


def _peaks(grads: Sequence[Tensor]) -> list[Tensor]:
    """Largest absolute values; 0 of a part without elements."""
    return list(torch._foreach_norm([grad if grad.numel() else grad.new_zeros(1) for grad in grads], math.inf))


def _short(values: Tensor) -> Any:
    """A number or a list of them, with the digits that people read."""
    found = values.tolist()
    return [_digits(each) for each in found] if isinstance(found, list) else _digits(found)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
