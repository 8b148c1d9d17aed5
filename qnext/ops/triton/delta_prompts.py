"""Longer pieces of Gated DeltaNet in inference, by GPU kernels. Legend: see qnext.ops.mixers.

The projections are read once, in their dtype; the inputs of the delta rule are written once, in fp32. The rule itself
is that of another package where one serves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qnext.ops import reference
from qnext.ops.caches import DeltaCache
from qnext.ops.checks import check_delta
from qnext.ops.packing import Packing
from qnext.ops.records import DeltaWeights
from qnext.ops.torch.delta_cache import Carried, read_carried, write_carried
from qnext.ops.torch.delta_mixer import split_qkvz
from qnext.ops.triton.delta_chunks import CHUNK_SIZE, chunked_delta_rule
from qnext.ops.triton.outside import fits_prompt_rule, prompt_rule
from qnext.ops.triton.train_mixer import MixerRows, MixerSizes, prepared
from qnext.ops.triton.train_rows import NormForm, normed
from qnext.ops.triton.trust import numbers


def chunked_delta_mixer(
    qkvz_TX: Tensor, ba_TY: Tensor, weights: DeltaWeights, *, packing: Packing, cache: DeltaCache | None = None
) -> Tensor:
    """See ops.gated_delta_mixer. Everything is fp32 with one cast at the end. Slots hold states in fp32, and nothing is
    a draft."""
    check_delta(qkvz_TX, ba_TY, weights, packing)
    rows, sizes = MixerRows(*(x.contiguous() for x in (qkvz_TX, ba_TY, *weights.tensors))), MixerSizes.of(weights)
    carried = None if cache is None else read_carried(cache, packing)
    inputs = prepared(rows, sizes, packing, None if carried is None else carried.conv_NWC)
    initial_NHKV = None if carried is None else carried.state_NHKV
    outside = prompt_rule(qkvz_TX.device) if fits_prompt_rule(qkvz_TX, weights, packing) else None
    rule = chunked_delta_rule if outside is None else outside
    o_THV, state_NHKV = rule(inputs, packing=packing, initial_state_NHKV=initial_NHKV)
    if cache is not None and carried is not None:
        write_carried(cache, carried, Carried(_last_inputs(rows, sizes, packing, carried.conv_NWC), state_NHKV))
    gates = (rows.qkvz_TX, sizes.gates)
    return normed(o_THV, rows.norm_V, NormForm(sizes.eps, False), gates, qkvz_TX.dtype).flatten(1)


def _last_inputs(rows: MixerRows, sizes: MixerSizes, packing: Packing, left_NWC: Tensor) -> Tensor:
    """[N, W - 1, C] inputs of the convolution at the end of each sequence; short ones keep some from before."""
    width = left_NWC.shape[1]
    places_NW = packing.lengths_N[:, None] - width + torch.arange(width, device=left_NWC.device)
    rows_NW = packing.cu_seqlens[:-1, None] + places_NW.clamp(min=0)
    heads = {"num_key_heads": sizes.num_key_heads, "key_head_dim": sizes.key_dim, "num_heads": sizes.num_heads}
    new_RC, _ = split_qkvz(rows.qkvz_TX.index_select(0, rows_NW.flatten()).float(), **heads)
    old_NWC = left_NWC.gather(1, (places_NW + width).clamp(max=width - 1)[..., None].expand_as(left_NWC))
    return torch.where((places_NW < 0)[..., None], old_NWC.float(), new_RC.view(left_NWC.shape))


def try_gated_delta_prompt(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Over slots: a continued sequence that is shorter than the convolution, and a fresh one of more than a chunk."""
    packing = Packing([2, CHUNK_SIZE + 1], device=device)
    weights = DeltaWeights(
        numbers(56, 1, 4, seed=0, device=device, scale=0.5),
        numbers(2, seed=1, device=device, scale=0.5),
        numbers(2, seed=2, device=device, scale=0.5),
        numbers(12, seed=3, device=device),
        eps=1e-6,
        num_key_heads=1,
        key_head_dim=16,
    )
    conv, state = numbers(3, 3, 56, seed=4, device=device), numbers(3, 2, 16, 12, seed=5, device=device)
    slots_N, is_fresh_N = torch.tensor([2, 0], device=device), torch.tensor([False, True], device=device)
    cache = DeltaCache(conv, state, slots_N, is_fresh_N)
    theirs = cache._replace(conv=conv.clone(), state=state.clone())
    qkvz_TX, ba_TY = (numbers(packing.num_tokens, width, seed=width, device=device) for width in (80, 4))
    wanted = reference.gated_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing, cache=theirs)
    yield chunked_delta_mixer(qkvz_TX, ba_TY, weights, packing=packing, cache=cache), wanted
    yield from ((conv, theirs.conv), (state, theirs.state))
