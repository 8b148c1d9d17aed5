"""Where attention looks, in blocks of queries: no matrix of all queries and all keys is ever in memory.

Legend: L queries of one sequence, S its context, B queries of a block, H query heads, G KV heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext import ops
from qnext.probe.rows import BatchRows
from qnext.probe.scratch import context_of

_CELLS = 1 << 22  # of one block: 16 MiB in fp32


class Attended(NamedTuple):
    """The queries of one sequence in a call, and all that they may look at. The last query sees every key."""

    q_LHK: Tensor
    k_SGK: Tensor
    v_SGK: Tensor
    scale: float

    @property
    def start(self) -> int:
        """The position of the first query."""
        return len(self.k_SGK) - len(self.q_LHK)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Queries, and their probabilities [H, B, S]."""
        size = max(1, _CELLS // max(1, self.q_LHK.shape[1] * len(self.k_SGK)))
        for begin in range(0, len(self.q_LHK), size):
            block = slice(begin, min(begin + size, len(self.q_LHK)))
            yield block, self.probabilities(torch.arange(block.start, block.stop, device=self.q_LHK.device))

    def probabilities(self, queries_B: Tensor) -> Tensor:
        """[H, B, S]: softmax of the scores of these queries, in fp32 at least."""
        wide = torch.promote_types(self.q_LHK.dtype, torch.float32)
        q_GRBK = self.q_LHK.index_select(0, queries_B).to(wide).unflatten(1, (self.k_SGK.shape[1], -1))
        q_GRBK = q_GRBK.permute(1, 2, 0, 3)
        k_GKS = self.k_SGK.to(wide).permute(1, 2, 0)
        scores_GRBS = self.scale * (q_GRBK @ k_GKS[:, None])
        places_S = torch.arange(len(self.k_SGK), device=q_GRBK.device)
        is_hidden_BS = places_S > self.start + queries_B[:, None]
        return scores_GRBS.masked_fill(is_hidden_BS, -torch.inf).softmax(-1).flatten(0, 1)

    def mix(self, probabilities_HBS: Tensor) -> Tensor:
        """[B, H, K]: what these probabilities take from the values."""
        values_GSK = self.v_SGK.to(probabilities_HBS.dtype).transpose(0, 1)
        out_GRBK = probabilities_HBS.unflatten(0, (len(values_GSK), -1)) @ values_GSK[:, None]
        return out_GRBK.flatten(0, 1).transpose(0, 1)


def attended(
    seen: dict[str, Tensor], packing: ops.Packing, cache: ops.AttentionCache | None, scale: float
) -> list[Attended]:
    """One for each sequence of a call, from the steps of a mixer and the pages that they were written to."""
    queries = seen["query"].split(packing.lengths)
    if cache is None:
        keys, values = seen["key"].split(packing.lengths), seen["value"].split(packing.lengths)
        return [Attended(*each, scale) for each in zip(queries, keys, values, strict=True)]
    found = []
    for q_LHK, table_M, context in zip(queries, cache.block_tables_NM, cache.context_lengths_N.tolist(), strict=True):
        k_SGK = context_of(cache.k_pages, cache.k_scales, table_M, context)
        v_SGK = context_of(cache.v_pages, cache.v_scales, table_M, context)
        found.append(Attended(q_LHK, k_SGK, v_SGK, scale))
    return found


def probabilities_of(found: Sequence[Attended], rows: BatchRows, chosen_R: Tensor) -> Tensor:
    """[R, H, S]: of the chosen rows of a call, in their order; S is the longest context."""
    longest = max(len(each.k_SGK) for each in found)
    parts, numbers, start = [], [], 0
    for each in found:
        own_B = chosen_R[(chosen_R >= start) & (chosen_R < start + len(each.q_LHK))]
        p_BHS = each.probabilities(own_B - start).transpose(0, 1)
        parts.append(torch.nn.functional.pad(p_BHS, (0, longest - p_BHS.shape[-1])))
        numbers.append(own_B)
        start += len(each.q_LHK)
    place_of = {row: place for place, row in enumerate(torch.cat(numbers).tolist())}
    order_R = torch.tensor([place_of[row] for row in chosen_R.tolist()], dtype=torch.long, device=chosen_R.device)
    return torch.cat(parts).index_select(0, order_R)


def mixed_by(probabilities_THS: Tensor, found: Sequence[Attended], packing: ops.Packing) -> Tensor:
    """[T, H, K]: what other probabilities take from the values."""
    parts = probabilities_THS.split(packing.lengths)
    return torch.cat(
        [each.mix(p_LHS[..., : len(each.k_SGK)].transpose(0, 1)) for p_LHS, each in zip(parts, found, strict=True)]
    )
