"""Which experts each token of a text goes to, and how probable each expert was.

Legend: L sparse layers of the trunk, T tokens, A chosen experts of a token, E experts, P scored positions, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qnext.diagnostics.statistics import block_starts
from qnext.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from qnext.model import CausalLM, RouterOutput

PIECE_TOKENS = 2048  # a longer text is read in pieces that do not see each other
_SCORED_BYTES = 1 << 28  # of the probabilities that a record keeps


@dataclass(frozen=True)
class RoutingRecord:
    """The choices of the routers of a trunk on one text. `log_probs_LPE` are those of the tokens at `positions_P`: all,
    or as many as 256 MiB hold, evenly spread."""

    layers: tuple[int, ...]
    num_experts: int
    chosen_LTA: NDArray[np.int16]
    mass_LE: NDArray[np.float64]  # sums of routing weights
    positions_P: NDArray[np.int64]
    log_probs_LPE: NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        return self.chosen_LTA.shape[1]

    @property
    def labels(self) -> list[str]:
        return [str(layer) for layer in self.layers]

    def one_hot(self, place: int) -> NDArray[np.float32]:
        """[T, E]: 1 where a token of layer number `place` chose an expert."""
        chosen_TA = self.chosen_LTA[place].astype(np.int64)
        hot_TE = np.zeros((len(chosen_TA), self.num_experts), dtype=np.float32)
        np.put_along_axis(hot_TE, chosen_TA, 1.0, axis=1)
        return hot_TE

    def counts(self) -> NDArray[np.int64]:
        """[L, E]: the tokens of each expert."""
        return self.block_counts().sum(axis=0)

    def block_counts(self) -> NDArray[np.int64]:
        """[B, L, E]: the tokens of each expert in each block of the text."""
        edges = [*block_starts(self.num_tokens).tolist(), self.num_tokens]
        num_layers, num_experts = len(self.layers), self.num_experts
        counts_BLE = np.empty((len(edges) - 1, num_layers, num_experts), dtype=np.int64)
        offsets_L11 = np.arange(num_layers)[:, None, None] * num_experts
        for block, (start, end) in enumerate(pairwise(edges)):
            flat = (self.chosen_LTA[:, start:end].astype(np.int64) + offsets_L11).ravel()
            counts = np.bincount(flat, minlength=num_layers * num_experts)
            counts_BLE[block] = counts.reshape(num_layers, num_experts)
        return counts_BLE


def routers_of(model: CausalLM) -> dict[int, nn.Module]:
    """The routers of the trunk by the index of their layer. Raises UsageError for a model without experts."""
    from qnext.model import SparseMoE

    routers: dict[int, nn.Module] = {
        place: layer.mlp.gate for place, layer in enumerate(model.model.layers) if isinstance(layer.mlp, SparseMoE)
    }
    if not routers:
        raise UsageError("the model has no experts")
    return routers


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Callable[[int, Any], Any]) -> Iterator[None]:
    """While it is open, `hook` gets the place and the output of each module, and may return another output."""

    def at(place: int) -> Callable[..., Any]:
        return lambda module, inputs, output: hook(place, output)

    handles = [module.register_forward_hook(at(place)) for place, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pieces_of(model: CausalLM, token_ids: Sequence[int]) -> list[range]:
    """The positions of a text, in pieces that the model reads one by one. Raises UsageError for an unknown id."""
    highest, size = max(token_ids), min(model.config.context_length, PIECE_TOKENS)
    if highest >= model.config.vocab_size:
        raise UsageError(f"token id {highest} is outside the model's vocabulary of {model.config.vocab_size}")
    return [range(start, min(start + size, len(token_ids))) for start in range(0, len(token_ids), size)]


def read_routing(
    model: CausalLM,
    token_ids: Sequence[int],
    *,
    with_scores: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingRecord:
    """The choices of the model on a text; their probabilities too `with_scores`. `progress` gets tokens done and all.

    Raises UsageError for a model without experts.
    """
    import torch

    from qnext.model import Batch

    routers, num_experts = routers_of(model), model.config.num_experts
    num_kept = max(1, _SCORED_BYTES // (4 * len(routers) * num_experts)) if with_scores else 0
    num_tokens = len(token_ids)
    kept_P = np.unique(np.linspace(0, num_tokens - 1, min(num_kept, num_tokens)).astype(np.int64))
    chosen: list[list[Any]] = [[] for _ in routers]
    scores: list[list[Any]] = [[] for _ in routers]
    mass_LE = np.zeros((len(routers), num_experts))
    piece = range(0)

    def see(place: int, output: RouterOutput) -> None:
        experts_TA, weights_TA = output.routing.experts_TA, output.routing.weights_TA
        chosen[place].append(experts_TA.to(torch.int16).numpy(force=True))
        flat, weights = experts_TA.flatten().cpu(), weights_TA.flatten().double().cpu()
        mass_LE[place] += torch.bincount(flat, weights=weights, minlength=num_experts).numpy()
        if len(kept_P):
            rows = kept_P[(kept_P >= piece.start) & (kept_P < piece.stop)] - piece.start
            logits_RE = output.logits_TE[torch.from_numpy(rows).to(output.logits_TE.device)]
            scores[place].append(logits_RE.float().log_softmax(-1).numpy(force=True))

    with torch.no_grad(), hooked(list(routers.values()), see):
        for piece in pieces_of(model, token_ids):
            ids_T = torch.tensor(token_ids[piece.start : piece.stop], device=model.device)
            model(Batch.from_lengths(ids_T, [len(piece)]))
            if progress is not None:
                progress(piece.stop, num_tokens)
    empty_LPE = np.empty((len(routers), 0, num_experts), dtype=np.float32)
    return RoutingRecord(
        layers=tuple(routers),
        num_experts=num_experts,
        chosen_LTA=np.stack([np.concatenate(each) for each in chosen]),
        mass_LE=mass_LE,
        positions_P=kept_P,
        log_probs_LPE=np.stack([np.concatenate(each) for each in scores]) if len(kept_P) else empty_LPE,
    )
