"""Attention of prompt pieces over pages by flashinfer, on queries and pages in bf16 with heads of 256 dims.

It plans each step on the host, from the lengths that the host knows: which processor takes which tiles. A graph would
go on with the plan of the step that was captured, so no call of a recorded step comes here: it has no lengths for the
host. Tokens that decode stay with our own kernel, which shares out the work of any lengths without a plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qnext.ops.caches import AttentionCache
from qnext.ops.packing import Packing
from qnext.ops.reference.attention import paged_attention
from qnext.ops.triton.outside.packages import MIN_PIECE, Package, first_trusted, is_for_hopper
from qnext.ops.triton.trust import numbers

PIECE_PACKAGES = (Package("flashinfer", "flashinfer.prefill"),)
_HEAD_DIM = 256
_WORKSPACE_BYTES = 1 << 20  # its kernels for Hopper do not cut contexts, and so keep no parts of results


class _PlannedPieces(NamedTuple):
    """What a plan was made for, by identity: none of it changes while a step lasts."""

    packing: Packing
    lengths: tuple[int, ...]
    tables_NM: Tensor
    scale: float

    def is_for(self, other: _PlannedPieces) -> bool:
        return all(mine is theirs for mine, theirs in zip(self[:3], other[:3], strict=True)) and self.scale == other[3]


class PieceAttention:
    """The wrapper of flashinfer on one device, and the step that it has a plan for. Any thread may call it."""

    def __init__(self, package: str, module: Any, device: torch.device) -> None:
        self.package = package
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="fa3")
        self._planned: _PlannedPieces | None = None
        self._sent: torch.cuda.Event | None = None
        self._lock = threading.Lock()

    def __call__(self, q_THK: Tensor, cache: AttentionCache, *, packing: Packing, scale: float) -> Tensor:
        """[T, H, K] in bf16: what each query reads of its sequence's pages, in which its own key is already."""
        assert cache.host_lengths is not None
        wanted = _PlannedPieces(packing, cache.host_lengths, cache.block_tables_NM, scale)
        with self._lock:
            if self._planned is None or not self._planned.is_for(wanted):
                self._plan(wanted, cache, num_heads=q_THK.shape[1])
            out_THK: Tensor = self._wrapper.run(q_THK, (cache.k_pages, cache.v_pages), out=torch.empty_like(q_THK))
        return out_THK

    def _plan(self, wanted: _PlannedPieces, cache: AttentionCache, *, num_heads: int) -> None:
        self._planned = None
        if self._sent is not None:
            self._sent.synchronize()  # a plan is copied from memory that the next one overwrites
        _, num_kv_heads, page_size, head_dim = cache.k_pages.shape
        counts = [-(-length // page_size) for length in wanted.lengths]
        pages = Packing(counts, device=wanted.tables_NM.device)
        self._wrapper.plan(
            _offsets(wanted.packing.lengths),
            _offsets(counts),
            wanted.tables_NM[pages.sequence_ids_T, pages.offsets_T].to(torch.int32),
            torch.tensor([(length - 1) % page_size + 1 for length in wanted.lengths], dtype=torch.int32),
            num_heads,
            num_kv_heads,
            head_dim,
            page_size,
            causal=True,
            sm_scale=wanted.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        if cache.k_pages.device.type == "cuda":
            self._sent = torch.cuda.current_stream(cache.k_pages.device).record_event()
        self._planned = wanted


def fits_piece_attention(q_THK: Tensor, cache: AttentionCache, packing: Packing) -> bool:
    """Whether a call is a piece of a prompt, outside of recorded steps, of the dtype and sizes that are served."""
    tensors = (q_THK, cache.k_pages, cache.v_pages)
    is_planned = cache.host_lengths is not None and packing.max_length >= MIN_PIECE
    return is_planned and all(x.dtype == torch.bfloat16 and x.shape[-1] == _HEAD_DIM for x in tensors)


@cache
def piece_attention(device: torch.device) -> PieceAttention | None:
    """The attention of another package that serves pieces of prompts on `device`. Asked once."""
    if not is_for_hopper(device):
        return None
    return first_trusted(
        "attention over pages",
        PIECE_PACKAGES,
        lambda package, module: PieceAttention(package, module, device),
        _try_pieces,
        device,
    )


def _offsets(lengths: tuple[int, ...] | list[int]) -> Tensor:
    """[N + 1] int32, on the host."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _try_pieces(attention: PieceAttention, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """A piece behind a context, a whole prompt of more than a tile, one token; two layers with one plan."""
    packing, lengths, page_size = Packing([9, 133, 1], device=device), (75, 133, 40), 16
    order = torch.randperm(18, generator=torch.Generator().manual_seed(6)).to(device)
    tables_NM = torch.stack([order.roll(-first)[:9] for first in (0, 5, 14)])
    q_THK = numbers(packing.num_tokens, 4, _HEAD_DIM, seed=0, device=device).bfloat16()
    for seed in (1, 3):
        pages = [numbers(18, 2, page_size, _HEAD_DIM, seed=seed + n, device=device).bfloat16() for n in range(2)]
        lengths_N = torch.tensor(lengths)
        cache = AttentionCache(pages[0], pages[1], None, None, tables_NM, lengths_N, lengths_N[:0], lengths)
        found = attention(q_THK, cache, packing=packing, scale=_HEAD_DIM**-0.5)
        yield found, paged_attention(q_THK.float(), cache, packing=packing, scale=_HEAD_DIM**-0.5)
