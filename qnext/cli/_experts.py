"""Counts of experts for a text, and what they say of a layer.

Legend: L sparse layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.engine import ExpertLoad
    from qnext.model import CausalLM

# Where quantisation has changed more than this, it is worth a look. A quantised model moves a few per cent of choices.
MOVED, COLLAPSED = 0.1, 0.05


@dataclass(frozen=True)
class LayerReport:
    """`counts` has the tokens of each expert. Shares are of all of them: top-k for each token.

    `entropy` is over its largest possible value; `balance` is the mean count over the highest: both 1 where all
    experts do the same. `top_percent` is the share of the busiest hundredth of the experts, one at least.
    """

    label: str
    counts: tuple[int, ...]
    num_tokens: int
    entropy: float
    balance: float
    top_percent: float
    hottest: tuple[tuple[int, float], ...]  # expert, share
    dead: tuple[int, ...]


@dataclass(frozen=True)
class LayerComparison:
    """`distance` is the total variation of the two distributions over the experts, 0 to 1: the part of all choices that
    would have to move to make them equal. `overlap` is the common part of the two sets of hottest experts.
    """

    label: str
    distance: float
    overlap: float
    entropy_change: float
    newly_dead: tuple[int, ...]

    @property
    def alert(self) -> str | None:
        if self.entropy_change < -COLLAPSED:
            return f"layer {self.label} collapses: entropy changes by {self.entropy_change:+.3f}"
        if self.distance > MOVED:
            return f"layer {self.label} chooses others: {self.distance:.1%} of the choices have moved"
        return None


def count_experts(
    model: CausalLM,
    token_ids: Sequence[int],
    *,
    max_tokens: int = 0,
    speculation: bool = False,
    eos_token_ids: frozenset[int] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ExpertLoad, list[int]]:
    """Load of the experts for `token_ids`, each counted once, and up to `max_tokens` ids that the model goes on with.

    A text that is longer than the context, or than the cache that fits the memory, is read in pieces that know nothing
    of each other; the last one is continued. `progress` gets tokens done and all tokens. Raises UsageError for a model
    without experts, DoesNotFit for an answer that leaves no room for text.
    """
    from qnext.engine import Engine, SamplingParams, TokenEvent

    if not model.config.num_experts:
        raise UsageError("the model has no experts")
    # The last token of an answer is never computed: one more is asked for.
    room = max_tokens + 1
    length = min(model.config.context_length, len(token_ids) + room)
    engine = Engine(
        model, max_num_seqs=1, max_model_len=length, prefix_cache=False, speculation=speculation,
        eos_token_ids=eos_token_ids, count_experts=True,
    )  # fmt: skip
    size = max(1, engine.max_model_len - room)
    answer: list[int] = []
    for start in range(0, len(token_ids), size):
        is_last = start + size >= len(token_ids)
        params = SamplingParams(temperature=0.0, max_tokens=room if is_last else 1)
        request = engine.add_request(token_ids[start : start + size], params)
        while engine.has_unfinished:
            events = engine.step()
            if request.fault is not None:
                raise request.fault
            if is_last:
                answer += [event.token.token_id for event in events if isinstance(event, TokenEvent)]
            if progress is not None:
                progress(min(engine.metrics.prompt_tokens_computed, len(token_ids)), len(token_ids))
    load = engine.expert_load()
    assert load is not None
    return load, answer[:max_tokens]


def report(load: ExpertLoad, *, num_trunk_layers: int, top_k: int, num_hottest: int) -> list[LayerReport]:
    """One for each sparse layer; the MTP layer only where it has counted anything."""
    found = []
    for layer in load.layers:
        is_mtp = layer.layer_index >= num_trunk_layers
        if not is_mtp or any(layer.tokens):
            label = "MTP" if is_mtp else str(layer.layer_index)
            found.append(_layer_report(label, layer.tokens, layer.entropy, top_k, num_hottest))
    return found


def _layer_report(label: str, counts: tuple[int, ...], entropy: float, top_k: int, num_hottest: int) -> LayerReport:
    counts_E = np.array(counts)
    total = max(1, int(counts_E.sum()))
    order = np.argsort(-counts_E, kind="stable")
    busiest = order[: math.ceil(len(counts) / 100)]
    return LayerReport(
        label=label,
        counts=counts,
        num_tokens=int(counts_E.sum()) // top_k,
        entropy=entropy,
        balance=float(counts_E.mean() / counts_E.max()) if counts_E.any() else 1.0,
        top_percent=float(counts_E[busiest].sum() / total),
        hottest=tuple((int(e), float(counts_E[e] / total)) for e in order[:num_hottest]),
        dead=tuple(np.flatnonzero(counts_E == 0).tolist()),
    )


def compare(first: Sequence[LayerReport], second: Sequence[LayerReport]) -> list[LayerComparison]:
    """Layers of the same label. Raises UsageError for models of different layers or experts."""
    shapes = [[(layer.label, len(layer.counts)) for layer in layers] for layers in (first, second)]
    if shapes[0] != shapes[1]:
        raise UsageError("the models have different layers or numbers of experts, so their loads cannot be compared")
    return [_compare(a, b) for a, b in zip(first, second, strict=True)]


def _compare(a: LayerReport, b: LayerReport) -> LayerComparison:
    shares = [np.array(layer.counts) / max(1, sum(layer.counts)) for layer in (a, b)]
    hot = [{expert for expert, _ in layer.hottest} for layer in (a, b)]
    return LayerComparison(
        label=a.label,
        distance=float(np.abs(shares[0] - shares[1]).sum() / 2),
        overlap=len(hot[0] & hot[1]) / max(1, len(hot[0])),
        entropy_change=b.entropy - a.entropy,
        newly_dead=tuple(sorted(set(b.dead) - set(a.dead))),
    )


def relative_loads(layers: Sequence[LayerReport]) -> NDArray[np.float64]:
    """[L, E]: counts over the layer's mean, 1 for a fair share."""
    counts_LE = np.array([layer.counts for layer in layers], dtype=np.float64)
    return counts_LE / np.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-9)


def layer_document(layer: LayerReport) -> dict[str, Any]:
    return {
        "layer": layer.label, "tokens": layer.num_tokens, "entropy": layer.entropy, "balance": layer.balance,
        "top_percent_share": layer.top_percent, "dead": list(layer.dead),
        "hottest": [{"expert": expert, "share": share} for expert, share in layer.hottest],
        "counts": list(layer.counts),
    }  # fmt: skip
