"""Counts of experts for a text, and statistics of each layer.

Legend: L sparse layers, E experts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.routing.ablation import Ablation, AblationPlan, ablate
from qnext.diagnostics.routing.record import RoutingRecord, read_routing
from qnext.errors import UsageError
from qnext.planning.expert_shape import expert_shape
from qnext.session.folder import ProgressOf, TextFolder, end_token_ids, load_weights

if TYPE_CHECKING:
    from qnext.engine import ExpertLoad
    from qnext.model import CausalLM

# Where quantisation has changed more than this, it is worth a look. A quantised model moves a few per cent of choices.
MOVED, COLLAPSED = 0.1, 0.05


@dataclass(frozen=True)
class LayerReport:
    """`counts` has the tokens of each expert. Shares are of all counts: top-k for each token.

    `entropy` is the entropy over its largest possible value, `balance` the mean count over the highest. Both are 1
    where all experts have the same load. `top_percent` is the share of the busiest hundredth of the experts, at least
    one.
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
    would have to move to make them equal. `overlap` is the common part of the two sets of hottest experts."""

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


@dataclass(frozen=True)
class ExpertQuestion:
    """What is counted: a text, and up to `max_tokens` generated tokens after it. `top` hottest experts are named.

    `with_record` keeps the choice of every token too, `with_scores` the probabilities as well. `against` are the tokens
    of another text to keep the choices of. `ablation` says which experts are removed, one at a time, while the text is
    read. `adapter` is a folder whose adapter the model gets.
    """

    top: int
    dtype: str | None = None
    max_tokens: int = 0
    speculation: bool = False
    with_record: bool = False
    with_scores: bool = False
    against: Sequence[int] = ()
    ablation: AblationPlan | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class ExpertAnswer:
    """Reports of the layers, the ids that the model generated, and what was asked for: the choices of text and
    generated ids, those of the other text, and the loss without experts."""

    layers: list[LayerReport]
    generated: list[int]
    record: RoutingRecord | None = None
    against: RoutingRecord | None = None
    ablation: Ablation | None = None


def check_pair(first: TextFolder, second: TextFolder) -> None:
    """Check, before weights are read, that the ids of both models mean the same and that they have as many layers and
    experts.

    Raises UsageError.
    """
    a, b = first.config, second.config
    shapes = [(c.num_hidden_layers, c.num_experts, c.num_experts_per_tok, c.vocab_size) for c in (a, b)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{second.path}: {shapes[1]} layers, experts, chosen ones and tokens of the vocabulary, but {first.path} "
            f"has {shapes[0]}"
        )


def experts_of_folder(
    folder: TextFolder, token_ids: Sequence[int], question: ExpertQuestion, *, loading: ProgressOf, counting: ProgressOf
) -> ExpertAnswer:
    """The model is loaded, asked and released. Raises the errors of `count_experts` and of `read_adapter`."""
    config = folder.config
    if not config.num_experts:
        raise UsageError(f"{folder.path}: the model has no experts")
    network = load_weights(folder, question.dtype, progress=loading)
    if question.adapter is not None:
        from qnext.checkpoint.adapters import read_adapter
        from qnext.lora.adapt import attach

        attach(network, read_adapter(question.adapter, config))
    with counting("counting") as progress:
        load, generated = count_experts(
            network,
            token_ids,
            max_tokens=question.max_tokens,
            speculation=question.speculation,
            eos_token_ids=end_token_ids(folder.tokenizer, config),
            progress=progress,
        )
    record = against = ablation = None
    ids = [*token_ids, *generated]
    if question.with_record:
        with counting("routing") as progress:
            record = read_routing(network, ids, with_scores=question.with_scores, progress=progress)
    if question.against:
        with counting("the other text") as progress:
            against = read_routing(network, question.against, progress=progress)
    if question.ablation is not None and record is not None:
        num_bytes = len(folder.tokenizer.decode(ids).encode())
        with counting("ablation") as progress:
            ablation = ablate(network, ids, record, question.ablation, num_bytes=num_bytes, progress=progress)
    del network
    gc.collect()  # before the next model is loaded
    num_layers, top_k = config.num_hidden_layers, config.num_experts_per_tok
    layers = report(load, num_trunk_layers=num_layers, top_k=top_k, num_hottest=question.top)
    return ExpertAnswer(layers, generated, record, against, ablation)


def count_experts(
    model: CausalLM,
    token_ids: Sequence[int],
    *,
    max_tokens: int = 0,
    speculation: bool = False,
    eos_token_ids: frozenset[int] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ExpertLoad, list[int]]:
    """The load of the experts for `token_ids`, each counted once, and for up to `max_tokens` ids that the model
    generates.

    A text that exceeds the context, or the cache that fits into memory, is read in independent pieces; the last one is
    continued. `progress` gets the tokens done and all tokens. Raises UsageError for a model without experts, DoesNotFit
    for an answer that leaves no space for text.
    """
    from qnext.engine import Engine, EngineConfig, SamplingParams, TokenEvent

    if not model.config.num_experts:
        raise UsageError("the model has no experts")
    # The last token of an answer is never computed: one more is asked for.
    room = max_tokens + 1
    length = min(model.config.context_length, len(token_ids) + room)
    engine = Engine.of(
        model,
        EngineConfig(
            max_num_seqs=1,
            max_model_len=length,
            prefix_cache=False,
            speculation=speculation,
            eos_token_ids=eos_token_ids,
            count_experts=True,
        ),
    )
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
    """One report for each sparse layer; for the MTP layer only where it has counted anything."""
    found = []
    for layer in load.layers:
        is_mtp = layer.layer_index >= num_trunk_layers
        if not is_mtp or any(layer.tokens):
            label = "MTP" if is_mtp else str(layer.layer_index)
            found.append(_layer_report(label, layer.tokens, top_k, num_hottest))
    return found


def _layer_report(label: str, counts: tuple[int, ...], top_k: int, num_hottest: int) -> LayerReport:
    counts_E = np.array(counts)
    shape = expert_shape(counts_E[None])
    total = max(1, int(counts_E.sum()))
    order = np.argsort(-counts_E, kind="stable")
    return LayerReport(
        label=label,
        counts=counts,
        num_tokens=int(counts_E.sum()) // top_k,
        entropy=float(shape.entropy_L[0]),
        balance=float(shape.balance_L[0]),
        top_percent=float(shape.top_share_L[0]),
        hottest=tuple((int(e), float(counts_E[e] / total)) for e in order[:num_hottest]),
        dead=tuple(np.flatnonzero(counts_E == 0).tolist()),
    )


def compare(first: Sequence[LayerReport], second: Sequence[LayerReport]) -> list[LayerComparison]:
    """Compares layers of the same label. Raises UsageError for models with different layers or experts."""
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
        "layer": layer.label,
        "tokens": layer.num_tokens,
        "entropy": layer.entropy,
        "balance": layer.balance,
        "top_percent_share": layer.top_percent,
        "dead": list(layer.dead),
        "hottest": [{"expert": expert, "share": share} for expert, share in layer.hottest],
        "counts": list(layer.counts),
    }


def experts_document(
    layers: Sequence[LayerReport],
    other: str | None,
    others: Sequence[LayerReport],
    comparisons: Sequence[LayerComparison],
) -> dict[str, Any]:
    """A JSON document for programs: the layers of a model, and beside them those of `other` where there is one."""
    document: dict[str, Any] = {"layers": [layer_document(layer) for layer in layers]}
    if other is not None:
        document["compare"] = {
            "model": other,
            "layers": [layer_document(layer) for layer in others],
            "comparison": [asdict(each) for each in comparisons],
            "alerts": [each.alert for each in comparisons if each.alert],
        }
    return document
