"""Logits of one sequence, in one pass or in chunks through a cache.

Legend: T tokens, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from qnext.engine.cache import Cache
    from qnext.model import Batch, CausalLM

_LOGIT_ROWS = 256


def iterate_logits(model: CausalLM, token_ids: Sequence[int], *, chunk: int | None) -> Iterator[Tensor]:
    """Rows [R, Y] in order, T in all. `chunk` None reads all tokens at once without a cache."""
    import torch

    token_ids_T = torch.tensor(token_ids, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        for batch in _batches(model, token_ids_T, chunk):
            hidden_TD = model(batch).hidden_TD
            for rows_RD in hidden_TD.split(_LOGIT_ROWS):
                yield model.logits(rows_RD)


def _batches(model: CausalLM, token_ids_T: Tensor, chunk: int | None) -> Iterator[Batch]:
    from qnext.engine.cache import BLOCK_SIZE, Cache
    from qnext.model import Batch

    num_tokens = token_ids_T.shape[0]
    if chunk is None:
        yield Batch.from_lengths(token_ids_T, [num_tokens])
        return
    cache = Cache(
        model.config, num_blocks=-(-num_tokens // BLOCK_SIZE), num_slots=1, max_model_len=num_tokens,
        dtype=model.dtype, device=model.device,
    )  # fmt: skip
    for start in range(0, num_tokens, chunk):
        yield _cached_batch(cache, token_ids_T, start, min(start + chunk, num_tokens))


def _cached_batch(cache: Cache, token_ids_T: Tensor, start: int, end: int) -> Batch:
    """Tokens [start, end) of the one sequence, which owns slot 0 and all pages in order."""
    import torch

    from qnext.model import Batch, CacheView
    from qnext.ops import Packing

    device = token_ids_T.device
    positions_T = torch.arange(start, end, device=device)
    view = CacheView(
        kv=cache.kv, delta=cache.delta, slots_N=torch.zeros(1, dtype=torch.long, device=device),
        is_fresh_N=torch.tensor([start == 0], device=device),
        block_tables_NM=torch.arange(-(-end // cache.block_size), device=device)[None],
        context_lengths_N=torch.tensor([end]), write_index_T=positions_T,
    )  # fmt: skip
    return Batch(token_ids_T[start:end], positions_T, Packing([end - start], device=device), view)
