"""What quantisation cost: the error of each tensor, and on a text KL, perplexity and the choices of the routers.

Legend: R rows, Y vocabulary, T tokens.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qnext.ops import QuantizedWeight, rounding_errors
from qnext.quant.layer import Rounded

NUM_WORST = 20
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorError:
    """`weight_error` is |W - Q| / |W| (Frobenius). `output_error` is the same for the outputs on the calibration
    inputs."""

    name: str
    bits: int
    group_size: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class KindError:
    """The errors of all tensors whose names differ only in numbers."""

    name: str
    bits: int
    group_size: int
    num_tensors: int
    mean_weight_error: float
    max_weight_error: float
    mean_output_error: float | None


@dataclass(frozen=True)
class RouterAgreement:
    """The share of the experts chosen by a layer's router in the original that it still chooses."""

    layer: int
    overlap: float


@dataclass(frozen=True)
class TextQuality:
    """Both models on the same text, in fp32, from rounded weights. Activations are not rounded.

    KL divergences are those of the quantised from the original distribution, in nats per token.
    """

    num_tokens: int
    perplexity_original: float
    perplexity_quantized: float
    kl_mean: float
    kl_max: float
    greedy_agreement: float  # tokens whose most likely successor is the same
    routers: tuple[RouterAgreement, ...]


@dataclass(frozen=True)
class QualityReport:
    scheme: str
    head: str | None  # the scheme of the head; None where it is kept
    method: str
    bytes_original: int
    bytes_quantized: int
    num_calibration_tokens: int
    kinds: tuple[KindError, ...]
    worst: tuple[TensorError, ...]
    text: TextQuality | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """What it cost in a few numbers, for the provenance of the folder."""
        errors = {kind.name: round(kind.mean_weight_error, 6) for kind in self.kinds}
        text = None if self.text is None else {k: v for k, v in asdict(self.text).items() if k != "routers"}
        return {"mean_weight_error": errors, "text": text}

    def table(self) -> str:
        """The report as a table for people."""
        ratio = self.bytes_quantized / self.bytes_original
        lines = [
            f"scheme     {self.scheme}, head {self.head or 'kept'}, {self.method}",
            f"bytes      {self.bytes_original:,} -> {self.bytes_quantized:,} ({ratio:.1%})",
        ]
        if self.text is not None:
            text = self.text
            change = text.perplexity_quantized / text.perplexity_original - 1
            lines += [
                f"perplexity {text.perplexity_original:.4f} -> {text.perplexity_quantized:.4f} ({change:+.2%}) "
                f"on {text.num_tokens:,} tokens kept from calibration",
                f"KL         {text.kl_mean:.5f} nats per token, at most {text.kl_max:.3f}; "
                f"greedy token equal {text.greedy_agreement:.1%}",
            ]
            if text.routers:
                least = min(text.routers, key=lambda router: router.overlap)
                mean = sum(router.overlap for router in text.routers) / len(text.routers)
                lines.append(f"routers    {mean:.1%} of choices kept, least {least.overlap:.1%} in layer {least.layer}")
        width = max([len(kind.name) for kind in self.kinds] + [len(error.name) for error in self.worst[:5]], default=0)
        lines.append(f"{'matrices':<{width}}  bits  group  number   error     max  output")
        for kind in self.kinds:
            lines.append(
                f"{kind.name:<{width}}  {kind.bits:4}  {kind.group_size:5}  {kind.num_tensors:6}  "
                f"{kind.mean_weight_error:6.4f}  {kind.max_weight_error:6.4f}  {_figure(kind.mean_output_error)}"
            )
        lines.append("worst")
        lines += [
            f"{error.name:<{width}}  {error.bits:4}  {error.group_size:5}  {'':6}  {error.weight_error:6.4f}  {'':6}  "
            f"{_figure(error.output_error)}"
            for error in self.worst[:5]
        ]
        return "\n".join(lines)


def _figure(error: float | None) -> str:
    return "     -" if error is None else f"{error:6.4f}"


def measure_error(name: str, rounded: Rounded, rows: slice) -> TensorError:
    """The error of `rows` of a matrix, which is stored on disk under `name`."""
    original_FD, weight = rounded.original[rows], rounded.weight
    weight = QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.bits, weight.group_size)
    output_error = None
    if rounded.moment is not None:
        original_FD = original_FD.to(torch.float32)
        difference_FD = weight.dequantize() - original_FD
        output_error = _ratio(_output_power(difference_FD, rounded.moment), _output_power(original_FD, rounded.moment))
    weight_error = _ratio(*rounding_errors(original_FD, weight).sum(0).tolist())
    return TensorError(name, weight.bits, weight.group_size, weight_error, output_error)


def _output_power(weight_FD: Tensor, moment_DD: Tensor) -> float:
    """trace(W M W^T): the mean square of the outputs, summed."""
    return float((weight_FD @ moment_DD).mul_(weight_FD).sum())


def _ratio(error: float, power: float) -> float:
    return math.sqrt(max(error, 0.0) / power) if power > 0 else 0.0


def summarize(errors: list[TensorError]) -> tuple[tuple[KindError, ...], tuple[TensorError, ...]]:
    """Errors by kind, and the worst tensors. The error of the outputs ranks them where it is known."""
    groups: dict[tuple[str, int, int], list[TensorError]] = defaultdict(list)
    for error in errors:
        groups[_NUMBER.sub("*", error.name), error.bits, error.group_size].append(error)
    kinds = []
    for (name, bits, group_size), members in groups.items():
        outputs = [error.output_error for error in members if error.output_error is not None]
        weights = [error.weight_error for error in members]
        mean_output = sum(outputs) / len(outputs) if outputs else None
        mean_weight = sum(weights) / len(weights)
        kinds.append(KindError(name, bits, group_size, len(members), mean_weight, max(weights), mean_output))
    worst = sorted(errors, key=lambda e: e.weight_error if e.output_error is None else e.output_error, reverse=True)
    return tuple(kinds), tuple(worst[:NUM_WORST])


class TextComparison:
    """Sums up what two models say about the same tokens."""

    def __init__(self) -> None:
        self._nats = [0.0, 0.0]
        self._kl = 0.0
        self._kl_max = 0.0
        self._num_tokens = 0
        self._num_agreed = 0
        self._routers: dict[int, list[int]] = {}

    def add_logits(self, original_RY: Tensor, quantized_RY: Tensor, targets_R: Tensor) -> None:
        p_RY, q_RY = (logits.to(torch.float32).log_softmax(-1) for logits in (original_RY, quantized_RY))
        for i, log_probs in enumerate((p_RY, q_RY)):
            self._nats[i] -= float(log_probs.gather(1, targets_R[:, None]).sum(dtype=torch.float64))
        kl_R = (p_RY.exp() * (p_RY - q_RY)).sum(-1)
        self._kl += float(kl_R.sum(dtype=torch.float64))
        self._kl_max = max(self._kl_max, float(kl_R.max()))
        self._num_agreed += int((p_RY.argmax(-1) == q_RY.argmax(-1)).sum())
        self._num_tokens += len(targets_R)

    def add_routing(self, layer: int, original_TA: Tensor, quantized_TA: Tensor) -> None:
        """Add the experts that both models chose for the same tokens, in any order."""
        kept = int((original_TA[:, :, None] == quantized_TA[:, None, :]).any(-1).sum())
        counts = self._routers.setdefault(layer, [0, 0])
        counts[0], counts[1] = counts[0] + kept, counts[1] + original_TA.numel()

    def result(self) -> TextQuality | None:
        """The comparison, or None where nothing was compared."""
        count = self._num_tokens
        if not count:
            return None
        routers = [RouterAgreement(layer, kept / total) for layer, (kept, total) in sorted(self._routers.items())]
        return TextQuality(
            num_tokens=count,
            perplexity_original=math.exp(self._nats[0] / count),
            perplexity_quantized=math.exp(self._nats[1] / count),
            kl_mean=self._kl / count,
            kl_max=self._kl_max,
            greedy_agreement=self._num_agreed / count,
            routers=tuple(routers),
        )
