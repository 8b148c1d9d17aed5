"""What a sequence carries from call to call, as the mixers read and write it: pages, recurrent states, drafts.

Legend: T tokens, N sequences, M pages of a sequence, P tokens in a page, G KV heads, L drafted tokens at most, J key
heads, H value heads, K and V key and value head dims, C conv channels, W conv width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.memory import empty_huge
from qnext.ops.packing import Packing

DELTA_CHUNK_SIZE = 64  # states in bf16 are rounded at multiples of it; torch cuts long sequences there


class AttentionCache(NamedTuple):
    """The pages of one layer, and where a step reads and writes them.

    Pages are [num_pages, G, P, K] in fp32, bf16 or int8. With int8, a number is its code times the scale of its token
    and KV head. The scales are [num_pages, G, P] in fp32.
    """

    k_pages: Tensor
    v_pages: Tensor
    k_scales: Tensor | None
    v_scales: Tensor | None
    block_tables_NM: Tensor  # int64 page numbers in order, padded with any valid page
    context_lengths_N: Tensor  # int64: tokens of each sequence, this step included; on the CPU, or where kernels read
    write_index_T: Tensor  # int64 page * P + offset for every token of the step
    # context_lengths_N as the host knows them, where the call is made once: what is planned with them holds for all
    # layers of the step. None where numbers and tables change from call to call, as in a recorded step.
    host_lengths: tuple[int, ...] | None = None


class PendingTokens(NamedTuple):
    """What the last draft of every slot computed, for one layer.

    The first `num_accepted` tokens come before everything else that the slot's sequence computes. The others are never
    read. A call on a slot sets its number to 0. The code that knows what was accepted writes the number, between calls.
    """

    conv: Tensor  # [num_slots, L, C] inputs of the convolution
    k: Tensor  # [num_slots, L, J, K] normalised keys
    u: Tensor  # [num_slots, L, H, V] with S <- decay S + k u^T
    decay: Tensor  # [num_slots, L, H]
    num_accepted: Tensor  # [num_slots] int64

    @property
    def num_drafts(self) -> int:
        """L: how many tokens a draft may have."""
        return self.conv.shape[1]

    @staticmethod
    def empty(
        num_slots: int,
        num_drafts: int,
        *,
        num_channels: int,
        num_key_heads: int,
        state_shape: tuple[int, int, int],
        device: torch.device | str,
    ) -> PendingTokens:
        """Space for drafts beside states of [H, K, V] in fp32. Nothing is accepted yet."""
        num_heads, key_dim, value_dim = state_shape
        shapes = ((num_channels,), (num_key_heads, key_dim), (num_heads, value_dim), (num_heads,))
        conv, k, u, decay = (
            empty_huge((num_slots, num_drafts, *shape), dtype=torch.float32, device=device) for shape in shapes
        )
        return PendingTokens(conv, k, u, decay, torch.zeros(num_slots, dtype=torch.long, device=device))

    def check_sizes(self, conv: Tensor, state: Tensor) -> None:
        """Raises ValueError where the sizes are not those of a layer's carried states."""
        num_slots, num_heads, key_dim, value_dim = state.shape
        num_channels = conv.shape[2]
        key_width = num_channels - num_heads * value_dim
        shapes = ((num_channels,), (key_width // (2 * key_dim), key_dim), (num_heads, value_dim), (num_heads,))
        if any(x.shape != (num_slots, self.num_drafts, *shape) for x, shape in zip(self, shapes, strict=False)):
            raise ValueError(
                f"pending tokens {[tuple(x.shape) for x in self]} do not fit states of {tuple(conv.shape)} and "
                f"{tuple(state.shape)}"
            )
        assert self.num_accepted.dtype == torch.int64 and self.num_accepted.shape == (num_slots,)


class DeltaCache(NamedTuple):
    """The carried states of one layer, and the slots of the sequences of a call. Updated in place.

    The old content of a fresh sequence's slot is never read. The slots of one call are all different. Where
    `is_draft_N` is true, the tokens of the call, at most `pending.num_drafts`, become pending, and the carried states
    stay. Accepted pending tokens come first in the next call. A bf16 state is rounded at the end of a call, after every
    drafted or accepted token, at multiples of 64 tokens of a prompt, and after every token behind the prompt. So a call
    that ends elsewhere in a prompt changes later bits.
    """

    conv: Tensor  # [num_slots, W - 1, C] last inputs of the convolution, oldest first
    state: Tensor  # [num_slots, H, K, V] fp32, fp64 for fp64 inputs, or bf16
    slots_N: Tensor  # int64
    is_fresh_N: Tensor  # bool: starts with this call, from zeros
    has_fresh: bool = True  # whether any of is_fresh_N may be true; false saves a pass over the states
    pending: PendingTokens | None = None
    is_draft_N: Tensor | None = None  # bool; None where nothing is a draft
    # For states in bf16, int64 on the CPU: tokens of each sequence with those of the call, None where they begin at a
    # multiple of 64; tokens of its prompt, None where the call has no others.
    context_lengths_N: Tensor | None = None
    prompt_lengths_N: Tensor | None = None

    def check_drafts(self, packing: Packing) -> None:
        """Raises ValueError for a draft that is longer than its slot has space for."""
        if self.is_draft_N is None or self.pending is None or packing.max_length <= self.pending.num_drafts:
            return  # which sequences draft need not be known, so a GPU is not waited for
        longest = int(torch.where(self.is_draft_N, packing.lengths_N, 0).max())
        if longest > self.pending.num_drafts:
            raise ValueError(f"a draft of {longest} tokens: slots hold at most {self.pending.num_drafts}")

    def check_pending(self) -> None:
        """Raises ValueError for pending tokens of other sizes, or where there is no space for drafts."""
        if self.pending is not None:
            self.pending.check_sizes(self.conv, self.state)
        elif self.is_draft_N is not None:
            raise ValueError("drafts need slots with pending tokens")
