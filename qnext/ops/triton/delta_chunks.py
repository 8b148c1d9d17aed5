"""The gated delta rule in chunks by a GPU kernel, for prompts. Legend: see qnext.ops.torch.delta."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.ops.packing import Packing
from qnext.ops.records import DeltaInputs, DeltaOutput
from qnext.ops.reference.delta import gated_delta_rule
from qnext.ops.torch.norm import l2_norm
from qnext.ops.triton.sizes import next_power_of_2
from qnext.ops.triton.trust import numbers

MAX_HEAD_DIM = 256
CHUNK_SIZE = 16  # with 32, operands of the products spill 3 KiB of a thread's registers
_BLOCK_VALUES = 32  # columns of a state that one program holds
_BLOCK_WIDE_VALUES = 16  # where operands are fp32, which take twice the registers
_LEAST_BLOCK = 16  # of a product
_NUM_WARPS = 8


class KeptChunks(NamedTuple):
    """What the gradient reads beside the inputs."""

    states_BHKV: Tensor  # before each chunk
    u_THV: Tensor  # what each token writes along its key


class ChunkBlocks(NamedTuple):
    """Constants of the programs."""

    IS_WIDE: bool  # operands of products are fp32; otherwise they are rounded to bf16
    BLOCK_C: int
    BLOCK_K: int
    BLOCK_V: int
    num_warps: int
    num_stages: int

    def num_blocks(self, value_dim: int) -> int:
        """Programs of a head."""
        return -(-value_dim // self.BLOCK_V)


def chunk_blocks(key_dim: int, value_dim: int, *, is_wide: bool) -> ChunkBlocks:
    most = _BLOCK_WIDE_VALUES if is_wide else _BLOCK_VALUES
    block = max(_LEAST_BLOCK, min(most, next_power_of_2(value_dim)))
    return ChunkBlocks(is_wide, CHUNK_SIZE, max(_LEAST_BLOCK, next_power_of_2(key_dim)), block, _NUM_WARPS, 1)


def plain_inputs(inputs: DeltaInputs) -> DeltaInputs:
    """In fp32. Heads of a token lie side by side, tokens at any distance; gates are contiguous."""
    q, k, v, g, beta = (x.float() for x in inputs)
    q, k, v = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v))
    return DeltaInputs(q, k, v, g.contiguous(), beta.contiguous())


def chunked_delta_rule(
    inputs: DeltaInputs, *, packing: Packing, initial_state_NHKV: Tensor | None = None
) -> DeltaOutput:
    """See ops.gated_delta_rule. All results are fp32."""
    return run_chunks(inputs, packing=packing, initial_state_NHKV=initial_state_NHKV)[0]


def run_chunks(
    inputs: DeltaInputs,
    *,
    packing: Packing,
    initial_state_NHKV: Tensor | None = None,
    keeps: bool = False,
    is_wide: bool = True,
) -> tuple[DeltaOutput, KeptChunks]:
    """The delta rule and, with `keeps`, what its gradient needs; without, memory that nothing wrote."""
    from qnext.ops.triton.kernels.delta_chunks import delta_chunks_kernel

    inputs = plain_inputs(inputs)
    q_TJK, k_TJK, v_THV, g_TH, beta_TH = inputs
    num_key_heads, key_dim = k_TJK.shape[1:]
    num_tokens, num_heads, value_dim = v_THV.shape
    o_THV = torch.empty((num_tokens, num_heads, value_dim), dtype=torch.float32, device=v_THV.device)
    state_NHKV = o_THV.new_empty(packing.num_sequences, num_heads, key_dim, value_dim)
    chunks, kept = packing.cu_seqlens, KeptChunks(state_NHKV, o_THV)
    if keeps:
        chunks, firsts_B, _ = packing.chunks(CHUNK_SIZE)
        kept = KeptChunks(o_THV.new_empty(len(firsts_B), num_heads, key_dim, value_dim), torch.empty_like(o_THV))
    blocks = chunk_blocks(key_dim, value_dim, is_wide=is_wide)
    delta_chunks_kernel[(packing.num_sequences, num_heads, blocks.num_blocks(value_dim))](
        q_TJK,
        k_TJK,
        v_THV,
        g_TH,
        beta_TH,
        packing.cu_seqlens,
        state_NHKV if initial_state_NHKV is None else initial_state_NHKV.float().contiguous(),
        o_THV,
        state_NHKV,
        chunks,
        *kept,
        q_TJK.stride(0),
        k_TJK.stride(0),
        v_THV.stride(0),
        num_key_heads,
        num_heads,
        key_dim,
        value_dim,
        HAS_STATE=initial_state_NHKV is not None,
        KEEPS=keeps,
        **blocks._asdict(),
    )
    return DeltaOutput(o_THV, state_NHKV), kept


def try_gated_delta_chunks(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences of less and of more than a chunk, from states and from zeros."""
    packing = Packing([5, CHUNK_SIZE + 3], device=device)
    num_tokens = packing.num_tokens
    inputs = DeltaInputs(
        l2_norm(numbers(num_tokens, 2, 24, seed=0, device=device)),
        l2_norm(numbers(num_tokens, 2, 24, seed=1, device=device)),
        numbers(num_tokens, 4, 20, seed=2, device=device),
        -numbers(num_tokens, 4, seed=3, device=device, scale=0.5).abs(),
        numbers(num_tokens, 4, seed=4, device=device).sigmoid(),
    )
    for state_NHKV in (None, numbers(2, 4, 24, 20, seed=5, device=device)):
        actual = chunked_delta_rule(inputs, packing=packing, initial_state_NHKV=state_NHKV)
        wanted = gated_delta_rule(inputs, packing=packing, initial_state_NHKV=state_NHKV)
        yield from zip(actual, wanted, strict=True)
