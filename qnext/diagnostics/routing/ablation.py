"""What the loss does without an expert: the model reads a text with and without it, and the tokens are compared in
pairs. How many tokens an expert gets does not say what it does for them (arXiv 2606.13168).

Legend: L sparse layers, T tokens, A chosen experts of a token, E experts, D hidden, R rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.routing.record import RoutingRecord, hooked, pieces_of, routers_of
from qnext.diagnostics.statistics import block_interval, spearman
from qnext.errors import UsageError
from qnext.eval.intervals import Interval

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qnext.model import Batch, CausalLM, RouterOutput
    from qnext.ops import Rope

Removal = Literal["reroute", "zero"]
_LOGIT_ELEMENTS = 1 << 22
_ONE = re.compile(r"([0-9]+):([0-9]+)")
_SOME = re.compile(r"(top|spread):([1-9][0-9]*)")


@dataclass(frozen=True)
class ExpertEffect:
    """An expert of a layer. `token_share` of the tokens chose it, and it has `mass_share` of all routing weight there.

    `effect` is what bits per byte grow by without it. `own_effect` is the same in bits for each token that chose it;
    None where none did.
    """

    label: str
    expert: int
    token_share: float
    mass_share: float
    effect: Interval
    own_effect: float | None

    @property
    def is_real(self) -> bool:
        """Whether the interval of the effect leaves zero out."""
        return self.effect.low > 0 or self.effect.high < 0


@dataclass(frozen=True)
class Ablation:
    """`rank_correlations` are Spearman's between mass and effect, of the experts of a layer that were removed, by its
    label; None where they cannot be ranked. `mean_correlation` is the mean over layers."""

    removal: Removal
    bits_per_byte: float
    effects: list[ExpertEffect]
    rank_correlations: dict[str, float | None]

    @property
    def mean_correlation(self) -> float | None:
        known = [each for each in self.rank_correlations.values() if each is not None]
        return float(np.mean(known)) if known else None


class AblationPlan(NamedTuple):
    """Which experts are removed, one at a time: "3:17" is expert 17 of layer 3; "top:8" the eight busiest of every
    layer; "spread:8" eight of every layer from the busiest to the idlest.

    "reroute": the router cannot choose the expert, so the next best takes its place, as in a model that lacks it.
    "zero": what it adds is left out, and nothing takes its place.
    """

    wanted: tuple[str, ...]
    removal: Removal = "reroute"

    def check(self) -> None:
        """Raises UsageError for a word that says nothing."""
        for word in self.wanted:
            if not _ONE.fullmatch(word) and not _SOME.fullmatch(word):
                raise UsageError(f"{word!r} names no expert: LAYER:EXPERT such as 3:17, top:N or spread:N is meant")

    def experts_of(self, record: RoutingRecord) -> dict[int, list[int]]:
        """By layer, the experts that are removed. Raises UsageError for one that is not there."""
        found: dict[int, list[int]] = {layer: [] for layer in record.layers}
        counts_LE = record.counts()
        for word in self.wanted:
            if one := _ONE.fullmatch(word):
                layer, expert = int(one[1]), int(one[2])
                if layer not in found or expert >= record.num_experts:
                    raise UsageError(f"{word}: the model has no such layer with experts, or no such expert in it")
                found[layer].append(expert)
                continue
            some = _SOME.fullmatch(word)
            assert some is not None
            for layer, counts_E in zip(record.layers, counts_LE, strict=True):
                found[layer] += _some_of(counts_E, int(some[2]), is_spread=some[1] == "spread")
        return {layer: list(dict.fromkeys(experts)) for layer, experts in found.items() if experts}


def ablate(
    model: CausalLM,
    token_ids: Sequence[int],
    record: RoutingRecord,
    plan: AblationPlan,
    *,
    num_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> Ablation:
    """The effects of removing experts on the bits per byte of a text of `num_bytes`. `record` is that of the same
    tokens.

    A layer is computed again only from the removed expert on, and not at all in a piece of the text that does not use
    it. Raises UsageError for a text of one token and for experts that are not there.
    """
    if len(token_ids) < 2:
        raise UsageError("a text of one token has no loss")
    experts = plan.experts_of(record)
    reader = _PieceLosses(model, plan.removal)
    pieces = [piece for piece in pieces_of(model, token_ids) if piece.start < len(token_ids) - 1]
    num_runs = len(pieces) * sum(map(len, experts.values()))
    whole_T = np.empty(len(token_ids) - 1)
    changes = {(layer, expert): np.zeros(len(token_ids) - 1) for layer in experts for expert in experts[layer]}
    done = 0
    for piece in pieces:
        ids = token_ids[piece.start : piece.stop + 1]
        rows = slice(piece.start, piece.start + len(ids) - 1)
        reader.begin(ids)
        whole_T[rows] = reader.losses()
        for layer in range(len(model.model.layers)):
            for expert in experts.get(layer, ()):
                place = record.layers.index(layer)
                if (record.chosen_LTA[place, rows] == expert).any():
                    changes[layer, expert][rows] = reader.losses_without(expert) - whole_T[rows]
                done += 1
                if progress is not None:
                    progress(done, num_runs)
            reader.pass_layer()
    first = math.log(model.config.vocab_size)  # of the first token, which nothing precedes: as `qnext eval` counts
    bits_per_byte = (float(whole_T.sum()) + first) / math.log(2) / num_bytes
    effects = [_effect(record, layer, expert, change_T, num_bytes) for (layer, expert), change_T in changes.items()]
    return Ablation(plan.removal, bits_per_byte, effects, _correlations(effects))


class _PieceLosses:
    """Computes the losses of a piece of text, whole or from the present layer on without an expert of it."""

    def __init__(self, model: CausalLM, removal: Removal) -> None:
        self._model = model
        self._removal = removal
        self._routers = routers_of(model)

    def begin(self, token_ids: Sequence[int]) -> None:
        import torch

        from qnext.model import Batch

        ids_T = torch.tensor(token_ids, device=self._model.device)
        self._targets_T = ids_T[1:]
        self._batch: Batch = Batch.from_lengths(ids_T[:-1], [len(ids_T) - 1])
        with torch.no_grad():
            self._rope: Rope = self._model.model.rotary(self._batch.positions_T)
            self._hidden_TD: Tensor = self._model.model.embed_tokens(self._batch.token_ids_T)
        self._layer = 0

    def pass_layer(self) -> None:
        """Go on to the next layer."""
        self._hidden_TD = self._after(self._hidden_TD, self._layer, self._layer + 1)
        self._layer += 1

    def losses(self) -> NDArray[np.float64]:
        """[T] nats of the token after each."""
        import torch

        model, found = self._model, []
        with torch.no_grad():
            hidden_TD = model.model.norm(self._after(self._hidden_TD, self._layer, len(model.model.layers)))
            rows = max(1, _LOGIT_ELEMENTS // model.config.vocab_size)
            for rows_RD, targets_R in zip(hidden_TD.split(rows), self._targets_T.split(rows), strict=True):
                logits_RY = model.logits(rows_RD)
                log_probs_RY = logits_RY.to(torch.promote_types(logits_RY.dtype, torch.float32)).log_softmax(-1)
                found.append(-log_probs_RY.gather(1, targets_R[:, None])[:, 0])
        return np.asarray(torch.cat(found).double().numpy(force=True))

    def losses_without(self, expert: int) -> NDArray[np.float64]:
        """[T] of the model whose present layer lacks the expert."""
        router = self._routers[self._layer]

        def remove(place: int, output: RouterOutput) -> RouterOutput:
            return without(output, expert, router=router, removal=self._removal)

        with hooked([router], remove):
            return self.losses()

    def _after(self, hidden_TD: Tensor, first: int, end: int) -> Tensor:
        import torch

        layers: nn.ModuleList = self._model.model.layers
        with torch.no_grad():
            for layer in layers[first:end]:
                hidden_TD = layer(hidden_TD, self._batch, self._rope)
        return hidden_TD


def without(output: RouterOutput, expert: int, *, router: nn.Module, removal: Removal) -> RouterOutput:
    """What the router would have said without an expert. Tokens that did not choose it keep their choice, bit for
    bit."""
    import torch

    from qnext import ops
    from qnext.model import Router

    assert isinstance(router, Router)
    weights_TA, experts_TA = output.routing
    is_removed_TA = experts_TA == expert
    if removal == "zero":
        return output._replace(routing=ops.Routing(weights_TA.masked_fill(is_removed_TA, 0.0), experts_TA))
    logits_TE = output.logits_TE.clone()
    logits_TE[:, expert] = -torch.inf
    other = ops.route(logits_TE, top_k=router.top_k, norm_topk_prob=router.norm_topk_prob)
    is_changed_T1 = is_removed_TA.any(dim=1, keepdim=True)
    weights_TA = torch.where(is_changed_T1, other.weights_TA, weights_TA)
    return output._replace(routing=ops.Routing(weights_TA, torch.where(is_changed_T1, other.experts_TA, experts_TA)))


def _some_of(counts_E: NDArray[np.int64], number: int, *, is_spread: bool) -> list[int]:
    order = np.argsort(-counts_E, kind="stable")
    number = min(number, len(order))
    places = np.linspace(0, len(order) - 1, number).round().astype(int) if is_spread else np.arange(number)
    return [int(expert) for expert in order[places]]


def _effect(
    record: RoutingRecord, layer: int, expert: int, change_T: NDArray[np.float64], num_bytes: int
) -> ExpertEffect:
    place, num_tokens = record.layers.index(layer), len(change_T)
    chose_T = (record.chosen_LTA[place, :num_tokens] == expert).any(axis=1)
    scale = num_tokens / math.log(2) / num_bytes
    return ExpertEffect(
        label=str(layer),
        expert=expert,
        token_share=float(chose_T.mean()),
        mass_share=float(record.mass_LE[place, expert] / record.mass_LE[place].sum()),
        effect=Interval(*(scale * value for value in block_interval(change_T))),
        own_effect=float(change_T[chose_T].mean() / math.log(2)) if chose_T.any() else None,
    )


def _correlations(effects: Sequence[ExpertEffect]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for label in dict.fromkeys(each.label for each in effects):
        of_layer = [each for each in effects if each.label == label]
        masses, values = [each.mass_share for each in of_layer], [each.effect.value for each in of_layer]
        found[label] = spearman(np.array(masses), np.array(values)) if len(of_layer) > 2 else None
    return found
