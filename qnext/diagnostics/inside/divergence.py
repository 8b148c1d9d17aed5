"""Where two models part: weights that differ, the first part of the first layer, the logits.

Legend: T tokens, X everything else of a tap, E experts, A experts of a token, Y vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qnext.diagnostics.inside.recording import RecordedPass, StoredTensor
from qnext.probe.edits import changed_rows


@dataclass(frozen=True)
class WeightDifferences:
    """Names of tensors in memory. A matrix that one model has quantised has another form."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_form: tuple[str, ...]  # another shape or dtype
    other_bits: tuple[str, ...]
    num_equal: int

    @property
    def are_none(self) -> bool:
        return not (self.only_a or self.only_b or self.other_form or self.other_bits)


@dataclass(frozen=True)
class TapDifference:
    """`relative` is |a - b| / |a| over all tokens, `worst_relative` that of the worst token. Of chosen experts,
    `relative` is the part of the choices that differs."""

    tap: str
    is_equal: bool
    first_token: int | None  # the first position with other bits
    relative: float
    worst_relative: float
    cosine: float  # mean over tokens


@dataclass(frozen=True)
class LogitDifference:
    """KL(a || b) in nats."""

    mean_kl: float
    largest_kl: float
    largest_kl_at: int
    same_first: float  # the part of the tokens after which both find the same token likeliest
    largest: float  # absolute difference


@dataclass(frozen=True)
class Divergence:
    """`tolerance` is a relative error. `taps` are those that both models have, in order."""

    num_tokens: int
    tolerance: float
    weights: WeightDifferences
    only_a: tuple[str, ...]  # taps
    only_b: tuple[str, ...]
    taps: tuple[TapDifference, ...]
    logits: LogitDifference | None  # None for two vocabularies

    @property
    def first_bits(self) -> TapDifference | None:
        """The first tap with other bits."""
        return next((tap for tap in self.taps if not tap.is_equal), None)

    @property
    def first_beyond(self) -> TapDifference | None:
        """The first tap beyond the tolerance."""
        return next((tap for tap in self.taps if not tap.relative <= self.tolerance), None)

    @property
    def is_exact(self) -> bool:
        return self.first_bits is None and not self.only_a and not self.only_b and self.logits is not None

    def of_layers(self, part: str) -> list[TapDifference]:
        """This part of every layer that has it."""
        return [tap for tap in self.taps if tap.tap.startswith("layers.") and tap.tap.endswith(f".{part}")]

    def document(self) -> dict[str, Any]:
        first, beyond = self.first_bits, self.first_beyond
        return {
            **asdict(self),
            "exact": self.is_exact,
            "first_bits": None if first is None else asdict(first),
            "first_beyond": None if beyond is None else asdict(beyond),
        }


def compare_passes(a: RecordedPass, b: RecordedPass, *, tolerance: float) -> Divergence:
    common = [name for name in a.taps if name in b.taps and a.taps[name].shape == b.taps[name].shape]
    logits = a.taps["logits"]
    return Divergence(
        num_tokens=len(logits),
        tolerance=tolerance,
        weights=_weights(a.weights, b.weights),
        only_a=_missing(a.taps, common),
        only_b=_missing(b.taps, common),
        taps=tuple(_tap(name, a.taps[name], b.taps[name]) for name in common),
        logits=_logits(logits, b.taps["logits"]) if "logits" in common else None,
    )


def _missing(taps: Mapping[str, Tensor], common: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in taps if name not in set(common))


def _weights(a: Mapping[str, StoredTensor], b: Mapping[str, StoredTensor]) -> WeightDifferences:
    both = [name for name in a if name in b]
    of_form = [name for name in both if (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype)]
    other_bits = tuple(name for name in of_form if a[name].checksum != b[name].checksum)
    only_a, only_b = ([name for name in one if name not in other] for one, other in ((a, b), (b, a)))
    packed = {_matrix_of(name) for name in only_a} & {_matrix_of(name) for name in only_b}
    return WeightDifferences(
        only_a=tuple(name for name in only_a if _matrix_of(name) not in packed),
        only_b=tuple(name for name in only_b if _matrix_of(name) not in packed),
        other_form=tuple(name for name in both if name not in set(of_form)) + tuple(sorted(packed)),
        other_bits=other_bits,
        num_equal=len(of_form) - len(other_bits),
    )


def _matrix_of(name: str) -> str:
    """A quantised matrix is NAME.0, NAME.1 and so on."""
    return re.sub(r"\.\d+$", "", name)


def _tap(name: str, a_TX: Tensor, b_TX: Tensor) -> TapDifference:
    if name.endswith("router.experts"):
        return _choices(name, a_TX, b_TX)
    is_same_form = a_TX.dtype == b_TX.dtype
    differs_T = changed_rows(a_TX, b_TX) if is_same_form else (a_TX.double() != b_TX.double()).flatten(1).any(1)
    a, b = a_TX.double().flatten(1), b_TX.double().flatten(1)
    error_T, size_T = (a - b).norm(dim=1), a.norm(dim=1)
    cosine_T = torch.cosine_similarity(a, b, dim=1)
    is_equal = not differs_T.any()  # bf16 and fp32 may hold the same numbers
    return TapDifference(
        name,
        is_equal,
        int(differs_T.nonzero()[0]) if differs_T.any() else None,
        _ratio(float(error_T.norm()), float(size_T.norm())),
        max(_ratio(error, size) for error, size in zip(error_T.tolist(), size_T.tolist(), strict=True)),
        1.0 if is_equal else float(cosine_T.mean()),
    )


def _choices(name: str, a_TA: Tensor, b_TA: Tensor) -> TapDifference:
    """Sets of experts: their order says nothing."""
    shared_TA = (a_TA[:, :, None] == b_TA[:, None]).any(-1)
    other_T = 1 - shared_TA.double().mean(1)
    differs_T = other_T > 0
    first = int(differs_T.nonzero()[0]) if differs_T.any() else None
    return TapDifference(name, first is None, first, float(other_T.mean()), float(other_T.max()), 1.0)


def _logits(a_TY: Tensor, b_TY: Tensor) -> LogitDifference:
    log_a, log_b = a_TY.double().log_softmax(-1), b_TY.double().log_softmax(-1)
    kl_T = (log_a.exp() * (log_a - log_b)).sum(-1)
    return LogitDifference(
        mean_kl=float(kl_T.mean()),
        largest_kl=float(kl_T.max()),
        largest_kl_at=int(kl_T.argmax()),
        same_first=float((a_TY.argmax(-1) == b_TY.argmax(-1)).double().mean()),
        largest=float((a_TY.double() - b_TY.double()).abs().max()),
    )


def _ratio(error: float, size: float) -> float:
    return error / size if size else float(error > 0)
