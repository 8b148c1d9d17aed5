"""Logits of one sequence, in one pass or in chunks through a cache.

Legend: T tokens, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from qnext.config import ModelConfig
    from qnext.engine.execution.cache import Cache
    from qnext.model import Batch, CausalLM

_LOGIT_ROWS = 256


def check_token_ids(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raises UsageError for an id outside the vocabulary, DoesNotFit for more ids than the context holds."""
    for place, token in enumerate(token_ids):
        if not 0 <= token < config.vocab_size:
            raise UsageError(f"id {token} at place {place} is outside the vocabulary of {config.vocab_size}")
    if len(token_ids) > config.context_length:
        raise DoesNotFit(f"{len(token_ids)} tokens, but the context is {config.context_length}")


def iterate_logits(model: CausalLM, token_ids: Sequence[int], *, chunk: int | None) -> Generator[Tensor, None, None]:
    """Rows [R, Y] in order, T in all. `chunk` None reads all tokens at once without a cache."""
    import torch

    with torch.inference_mode():
        for batch in _batches(model, tuple(token_ids), chunk):
            hidden_TD = model(batch).hidden_TD
            for rows_RD in hidden_TD.split(_LOGIT_ROWS):
                yield model.logits(rows_RD)


def write_npy(path: Path, rows: Iterable[Tensor], *, shape: tuple[int, int]) -> None:
    """Stream the rows as float32 into a file that appears only when it is complete."""
    import numpy as np
    import torch

    from qnext.files import new_file

    with new_file(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in rows:
            file.write(part.to(torch.float32).cpu().contiguous().numpy().data)


def _batches(model: CausalLM, token_ids: tuple[int, ...], chunk: int | None) -> Iterator[Batch]:
    import torch

    from qnext.engine.execution.cache import BLOCK_SIZE, Cache, CacheDtypes, CacheSizes
    from qnext.model import Batch

    num_tokens = len(token_ids)
    if chunk is None:
        yield Batch.from_lengths(torch.tensor(token_ids, dtype=torch.long, device=model.device), [num_tokens])
        return
    cache = Cache(
        model.config,
        CacheSizes(num_blocks=-(-num_tokens // BLOCK_SIZE), num_slots=1, max_model_len=num_tokens),
        CacheDtypes(activations=model.dtype, kv=model.dtype),
        device=model.device,
    )
    for start in range(0, num_tokens, chunk):
        yield _cached_batch(cache, token_ids[start : start + chunk], start)


def _cached_batch(cache: Cache, token_ids: tuple[int, ...], start: int) -> Batch:
    """Tokens from `start` on of the one sequence, which owns slot 0 and all pages in order."""
    from qnext.engine.execution.inputs import MixedInputs
    from qnext.engine.policy.step import Rows, SequencePlan, StepPlan

    blocks = tuple(range(cache.max_pages)) if cache.kv and not start else ()
    cache.prepare(StepPlan((SequencePlan("", 0, token_ids, start, needs_sample=False, blocks=blocks),)))
    return MixedInputs(cache, [Rows(0, token_ids, start)]).batch
