"""What a text does inside a model, layer by layer: the observer of a run, and the findings of its sums.

Legend: T tokens, D hidden, H heads, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qnext.diagnostics.inside.attention_sums import AttentionSums, first_of_bins
from qnext.diagnostics.inside.delta_sums import DeltaSums
from qnext.errors import DoesNotFit, UsageError
from qnext.probe import Attended, BatchRows, DeltaSeen, ModelProbe
from qnext.probe.names import prefix_of

if TYPE_CHECKING:
    from qnext.model import CausalLM

Floats = tuple[float, ...]


@dataclass(frozen=True)
class TopToken:
    """A token of the text, and its part of all attention or of all reads."""

    position: int
    share: float


@dataclass(frozen=True)
class AttentionReport:
    """One full-attention layer; lists are of its query heads.

    `entropy` is in nats. `distance` has a row for each head: the parts of its attention that go to the bins of
    distances. `gate` is the mean of sigmoid(gate), `closed` the part of gates below 0.1; both are empty without gates.
    """

    layer: int
    first_token: Floats
    entropy: Floats
    distance: tuple[Floats, ...]
    gate: Floats
    closed: Floats
    top: tuple[TopToken, ...]
    kind: str = "attention"


@dataclass(frozen=True)
class DeltaReport:
    """One Gated DeltaNet layer; lists are of its value heads.

    Half-lives are in tokens: the median over the text, and the tenths below and above. `read` is the mean of |S^T q|
    over the text, `decoded_read` over generated tokens. `reach` is the distance within which half of what the last
    tokens read was written; `distance` has those reads by bins, the mean over heads.
    """

    layer: int
    half_life: Floats
    half_life_low: Floats
    half_life_high: Floats
    beta: Floats
    gate: Floats
    state_norm: Floats
    state_rank: Floats
    read: Floats
    decoded_read: Floats
    reach: Floats
    distance: Floats
    top: tuple[TopToken, ...]
    kind: str = "delta"


@dataclass(frozen=True)
class InsideReport:
    """`largest` has the largest absolute value of the residual stream behind each layer, `rms` its root mean square,
    and `largest_at` the position of the token."""

    num_tokens: int
    generated: tuple[int, ...]
    bins: tuple[int, ...]  # the smallest distance of each
    layers: tuple[AttentionReport | DeltaReport, ...]
    largest: Floats
    largest_at: tuple[int, ...]
    rms: Floats

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def attention(self) -> list[AttentionReport]:
        return [layer for layer in self.layers if isinstance(layer, AttentionReport)]

    @property
    def delta(self) -> list[DeltaReport]:
        return [layer for layer in self.layers if isinstance(layer, DeltaReport)]


def look_inside(
    model: CausalLM,
    token_ids: Sequence[int],
    *,
    num_generated: int = 0,
    num_top: int = 5,
    eos_token_ids: frozenset[int] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> InsideReport:
    """Reads a text of two tokens or more in pieces, and goes on for up to `num_generated` tokens.

    Raises UsageError for a shorter text, DoesNotFit for one that is longer than the context or the memory.
    """
    from qnext.engine import Engine, EngineConfig, SamplingParams, TokenEvent

    if len(token_ids) < 2:
        raise UsageError("the text has one token, which can look at nothing but itself")
    if len(token_ids) + num_generated >= model.config.context_length:
        more = f" and {num_generated} generated ones" if num_generated else ""
        raise DoesNotFit(f"{len(token_ids)} tokens{more}, but the context is {model.config.context_length}")
    # The last token of an answer is never computed: one more is asked for.
    room = num_generated + 1
    config = EngineConfig(
        max_num_seqs=1,
        max_model_len=len(token_ids) + room,
        prefix_cache=False,
        speculation=False,
        count_experts=False,
        eos_token_ids=eos_token_ids,
    )
    watch = _InsideObserver(len(token_ids) + num_generated, len(token_ids))
    answer: list[int] = []
    with Engine.of(model, config) as engine, ModelProbe(model, observer=watch):
        request = engine.add_request(token_ids, SamplingParams(temperature=0.0, max_tokens=room))
        while engine.has_unfinished:
            events = engine.step()
            if request.fault is not None:
                raise request.fault
            answer += [event.token.token_id for event in events if isinstance(event, TokenEvent)]
            if progress is not None:
                progress(min(engine.metrics.prompt_tokens_computed, len(token_ids)), len(token_ids))
    prefixes = [prefix_of(model.config, layer) for layer in range(model.config.num_hidden_layers)]
    return watch.report(prefixes, tuple(answer[:num_generated]), num_top)


class _InsideObserver:
    sees: Collection[str] = ("residual", "attention", "delta")

    def __init__(self, num_tokens: int, num_prompt: int) -> None:
        self._num_tokens, self._num_prompt = num_tokens, num_prompt
        self._attention: dict[str, AttentionSums] = {}
        self._delta: dict[str, DeltaSums] = {}
        self._largest: dict[str, tuple[float, int]] = {}
        self._squares: dict[str, tuple[float, int]] = {}

    def see_residual(self, prefix: str, rows: BatchRows, hidden_TD: Tensor) -> None:
        sizes_T = hidden_TD.float().abs().amax(-1)
        row = int(sizes_T.argmax())
        found = float(sizes_T[row]), rows.positions[row]
        self._largest[prefix] = max(self._largest.get(prefix, found), found, key=lambda pair: pair[0])
        total, count = self._squares.get(prefix, (0.0, 0))
        self._squares[prefix] = total + float(hidden_TD.double().square().sum()), count + hidden_TD.numel()

    def see_attention(
        self, prefix: str, rows: BatchRows, attended: Sequence[Attended], steps: Mapping[str, Tensor]
    ) -> None:
        self._attention.setdefault(prefix, AttentionSums()).add(attended[0], steps)

    def see_delta(self, prefix: str, rows: BatchRows, seen: DeltaSeen) -> None:
        self._delta.setdefault(prefix, DeltaSums(self._num_tokens, self._num_prompt)).add(rows.positions_T, seen)

    def report(self, prefixes: Sequence[str], generated: tuple[int, ...], num_top: int) -> InsideReport:
        bins = first_of_bins(self._num_tokens)
        layers: list[AttentionReport | DeltaReport] = []
        for layer, prefix in enumerate(prefixes):
            if prefix in self._attention:
                layers.append(_attention_report(layer, self._attention[prefix], len(bins), num_top))
            else:
                layers.append(_delta_report(layer, self._delta[prefix], bins, num_top))
        return InsideReport(
            num_tokens=self._num_prompt,
            generated=generated,
            bins=tuple(bins),
            layers=tuple(layers),
            largest=tuple(self._largest[prefix][0] for prefix in prefixes),
            largest_at=tuple(self._largest[prefix][1] for prefix in prefixes),
            rms=tuple(float(np.sqrt(total / count)) for total, count in map(self._squares.__getitem__, prefixes)),
        )


def _attention_report(layer: int, sums: AttentionSums, num_bins: int, num_top: int) -> AttentionReport:
    queries = sums.num_queries
    gates = [] if sums.gate_H is None or sums.closed_H is None else [sums.gate_H, sums.closed_H]
    gate, closed = (_floats(each / queries) for each in gates) if gates else ((), ())
    return AttentionReport(
        layer,
        first_token=_floats(sums.first_token_H / (queries - 1)),
        entropy=_floats(sums.entropy_H / queries),
        distance=tuple(_floats(row / queries) for row in sums.distance_HD[:, :num_bins]),
        gate=gate,
        closed=closed,
        top=_top(sums.received_S / queries, np.arange(len(sums.received_S)), num_top),
    )


def _delta_report(layer: int, sums: DeltaSums, bins: Sequence[int], num_top: int) -> DeltaReport:
    low_H, median_H, high_H = np.quantile(sums.half_lives(), [0.1, 0.5, 0.9], axis=0)
    reads, tokens = sums.reads(), sums.num_tokens
    distances_QW = reads.readers_Q[:, None] - reads.positions_W
    assert sums.state_HKV is not None
    by_bin = [
        float((reads.shares_HQW * ((distances_QW >= start) & (distances_QW < end))).sum(-1).mean())
        for start, end in zip(bins, [*bins[1:], np.inf], strict=True)
    ]
    return DeltaReport(
        layer,
        half_life=_floats(median_H),
        half_life_low=_floats(low_H),
        half_life_high=_floats(high_H),
        beta=_floats(sums.beta_H / tokens),
        gate=_floats(sums.gate_H / tokens),
        state_norm=_floats(sums.state_HKV.norm(dim=(1, 2)).double().numpy(force=True)),
        state_rank=_floats(sums.effective_ranks()),
        read=_floats(sums.read_H / max(1, tokens - sums.num_decoded)),
        decoded_read=_floats(sums.decoded_read_H / sums.num_decoded) if sums.num_decoded else (),
        reach=_floats(_reach(reads.shares_HQW, distances_QW)),
        distance=tuple(by_bin),
        top=_top(reads.shares_HQW.mean((0, 1)), reads.positions_W, num_top),
    )


def _reach(shares_HQW: NDArray[np.float64], distances_QW: NDArray[np.int64]) -> NDArray[np.float64]:
    """[H]: the smallest distance within which half of the reads lie, the mean over readers."""
    found = []
    for shares_HW, distances_W in zip(shares_HQW.swapaxes(0, 1), distances_QW, strict=True):
        nearest = np.argsort(np.where(distances_W < 0, np.iinfo(np.int64).max, distances_W), kind="stable")
        reached_HW = np.cumsum(shares_HW[:, nearest], axis=1)
        found.append(distances_W[nearest][np.argmax(reached_HW >= 0.5, axis=1)])
    return np.mean(found, axis=0)


def _top(shares_S: NDArray[np.float64], positions_S: NDArray[np.int64], count: int) -> tuple[TopToken, ...]:
    order = np.argsort(-shares_S, kind="stable")[:count]
    return tuple(TopToken(int(positions_S[place]), float(shares_S[place])) for place in order)


def _floats(values: NDArray[np.float64]) -> Floats:
    return tuple(float(f"{value:.6g}") for value in values)
