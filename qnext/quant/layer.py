"""Quantises one decoder layer with the activations that reach it. The layer keeps the rounded weights.

Legend: T tokens, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qnext.model import Batch, DecoderLayer, SparseMoE
from qnext.model.layers import MLP, Linear
from qnext.ops import QuantizedWeight, dequantize, swiglu
from qnext.quant.rounding import round_calibrated, round_nearest
from qnext.quant.scheme import QuantScheme

_PRIOR_ROWS = 512  # tokens of the layer that stand for those an expert did not see


class TextChunk(NamedTuple):
    """Some sequences of a text and their activations between two layers."""

    batch: Batch
    rope: tuple[Tensor, Tensor]
    hidden_TD: Tensor


class Rounded(NamedTuple):
    """A parameter of the layer, or one expert of it, before and after rounding."""

    name: str  # within the layer
    expert: int | None
    original: Tensor
    weight: QuantizedWeight
    moment: Tensor | None  # of its inputs


SchemeOf = Callable[[str], QuantScheme | None]


def round_matrix(
    weight_FD: Tensor, moment_DD: Tensor | None, scheme: QuantScheme, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Round by GPTQ where a second moment of the inputs is given, and to nearest otherwise."""
    if moment_DD is None:
        return round_nearest(weight_FD, scheme, scale_dtype=scale_dtype)
    return round_calibrated(weight_FD, moment_DD, scheme, scale_dtype=scale_dtype)


class LayerQuantizer:
    """Rounds a layer's matrices in the order of the forward pass, so that each sees the inputs that it will have.

    The activations are those of the quantised layers before it. `scheme_of` maps a parameter name within the layer to
    its scheme; experts have their stacked names. Without `is_calibrated` each weight becomes the nearest code.
    """

    def __init__(
        self, layer: DecoderLayer, *, scheme_of: SchemeOf, scale_dtype: torch.dtype, is_calibrated: bool
    ) -> None:
        self.layer = layer
        self.scheme_of = scheme_of
        self.scale_dtype = scale_dtype
        self.is_calibrated = is_calibrated

    def run(self, chunks: Sequence[TextChunk]) -> Iterator[Rounded]:
        """Yields what it has rounded. Afterwards the layer computes with the rounded weights."""
        mixer_name = "linear_attn" if self.layer.is_linear else "self_attn"
        mixer = getattr(self.layer, mixer_name)
        names = ("in_proj_qkvz",) if self.layer.is_linear else ("q_proj", "k_proj", "v_proj")
        moment = self._moment(self.layer.input_layernorm(chunk.hidden_TD) for chunk in chunks)
        for name in names:
            yield from self._linear(f"{mixer_name}.{name}", moment)
        last = "out_proj" if self.layer.is_linear else "o_proj"
        moment = self._moment(self._mixer_inner(getattr(mixer, last), chunk) for chunk in chunks)
        yield from self._linear(f"{mixer_name}.{last}", moment)
        if not self.is_calibrated:
            normed_TD = torch.empty(0)
        else:
            normed_TD = torch.cat(
                [self.layer.post_attention_layernorm(chunk.hidden_TD + self._mix(chunk)) for chunk in chunks]
            )
        mlp = self.layer.mlp
        if isinstance(mlp, SparseMoE):
            yield from self._sparse(mlp, normed_TD)
        else:
            assert isinstance(mlp, MLP)
            yield from self._dense(mlp, "mlp.", normed_TD)

    def _mix(self, chunk: TextChunk) -> Tensor:
        normed_TD = self.layer.input_layernorm(chunk.hidden_TD)
        if self.layer.is_linear:
            return self.layer.linear_attn(normed_TD, chunk.batch)
        return self.layer.self_attn(normed_TD, chunk.batch, chunk.rope)

    def _mixer_inner(self, projection: nn.Module, chunk: TextChunk) -> Tensor:
        """The input of the mixer's last projection."""
        seen: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self._mix(chunk)
        finally:
            hook.remove()
        return seen[0]

    def _moment(self, rows: Iterator[Tensor]) -> Tensor | None:
        """Mean of x x^T over all rows, or None where nothing is calibrated."""
        if not self.is_calibrated:
            return None
        total, count = None, 0
        for rows_TD in rows:
            product = rows_TD.t() @ rows_TD
            total = product if total is None else total.add_(product)
            count += len(rows_TD)
        assert total is not None
        return total.div_(count)

    def _linear(self, name: str, moment: Tensor | None) -> Iterator[Rounded]:
        scheme = self.scheme_of(f"{name}.weight")
        if scheme is None:
            return
        linear = self.layer.get_submodule(name)
        assert isinstance(linear, Linear)
        original = linear.weight.detach()
        rounded = round_matrix(original, moment, scheme, scale_dtype=self.scale_dtype)
        linear.set_weight("weight", nn.Parameter(rounded.dequantize(), requires_grad=False))
        yield Rounded(f"{name}.weight", None, original, rounded, moment)

    def _dense(self, mlp: MLP, prefix: str, x_TD: Tensor, gate_T1: Tensor | None = None) -> Iterator[Rounded]:
        """`gate_T1` is what scales the output for each token: an input counts as much as its effect."""
        moment = self._moment(iter([x_TD if gate_T1 is None else x_TD * gate_T1]))
        yield from self._linear(f"{prefix}gate_proj", moment)
        yield from self._linear(f"{prefix}up_proj", moment)
        hidden_TF = x_TD
        if self.is_calibrated:
            hidden_TF = torch.nn.functional.silu(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)
            hidden_TF = hidden_TF if gate_T1 is None else hidden_TF * gate_T1
        yield from self._linear(f"{prefix}down_proj", self._moment(iter([hidden_TF])))

    def _sparse(self, mlp: SparseMoE, x_TD: Tensor) -> Iterator[Rounded]:
        if mlp.shared_expert is not None:
            gate_T1 = torch.sigmoid(mlp.shared_expert_gate(x_TD)) if self.is_calibrated else None
            yield from self._dense(mlp.shared_expert, "mlp.shared_expert.", x_TD, gate_T1)
        schemes = [self.scheme_of(f"mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")]
        num_experts = len(mlp.experts.gate_up_proj)
        if not self.is_calibrated:
            for expert in range(num_experts):
                for name, scheme in zip(("gate_up_proj", "down_proj"), schemes, strict=True):
                    yield from self._expert(mlp, name, expert, scheme, None)
            return
        routing = mlp.gate(x_TD).routing
        sample_TD = x_TD[:: max(1, len(x_TD) // _PRIOR_ROWS)]
        pooled = second_moment(x_TD)
        for expert in range(num_experts):
            tokens, choice = (routing.experts_TA == expert).nonzero(as_tuple=True)
            weights = routing.weights_TA[tokens, choice, None].to(x_TD.dtype)
            rows = x_TD[tokens]
            moment = expert_moment(rows, weights, pooled)
            yield from self._expert(mlp, "gate_up_proj", expert, schemes[0], moment)
            matrix = mlp.experts.gate_up_proj[expert].t()
            prior = second_moment(swiglu(*(sample_TD @ matrix).chunk(2, dim=-1)))
            moment = expert_moment(swiglu(*(rows @ matrix).chunk(2, dim=-1)), weights, prior)
            yield from self._expert(mlp, "down_proj", expert, schemes[1], moment)

    def _expert(
        self, mlp: SparseMoE, name: str, expert: int, scheme: QuantScheme | None, moment: Tensor | None
    ) -> Iterator[Rounded]:
        if scheme is None:
            return
        stacked = getattr(mlp.experts, name)
        original = stacked[expert].detach().clone()
        rounded = round_matrix(original, moment, scheme, scale_dtype=self.scale_dtype)
        stacked.data[expert] = dequantize(rounded, stacked.dtype)
        yield Rounded(f"mlp.experts.{name}", expert, original, rounded, moment)


def second_moment(x_TD: Tensor) -> Tensor:
    """[D, D] mean of x x^T."""
    return (x_TD.t() @ x_TD).div_(max(1, len(x_TD)))


def expert_moment(x_TD: Tensor, weights_T1: Tensor, prior_DD: Tensor) -> Tensor:
    """The second moment of an expert's inputs. Each token counts as its squared routing weight.

    The routing weight scales the expert's output, so its square scales the error. An expert that saw fewer tokens than
    it has inputs has no full moment. So `prior_DD`, the moment of all tokens of the layer, counts as that many tokens:
    an expert without tokens has only the prior, and for one with many tokens the prior hardly counts.
    """
    count, num_inputs = x_TD.shape
    total = weights_T1.square().sum()
    if not total > 0:
        return prior_DD
    scaled = x_TD * weights_T1
    return (scaled.t() @ scaled).div_(total).mul_(count).add_(prior_DD, alpha=num_inputs).div_(count + num_inputs)
