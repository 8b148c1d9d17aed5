"""A prompt on GPU kernels at the released sizes: our own, and beside them those of other packages that are trusted.

Bytes are those that an op is given and gives. The time of the planning that flashinfer does once a step is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from qnext.ops import AttentionCache, AttentionWeights, DeltaInputs, Packing, Rope, l2_norm
from qnext.ops import triton as gpu


class PromptSizes(NamedTuple):
    num_tokens: int
    key_heads: int
    heads: int  # of values in Gated DeltaNet
    head_dim: int
    query_heads: int
    kv_heads: int
    attention_dim: int


RELEASED = PromptSizes(8192, 16, 32, 128, 16, 2, 256)
SMALLEST = PromptSizes(20, 1, 2, 16, 2, 1, 16)


def prompt_cases(sizes: PromptSizes, device: torch.device) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, bytes and call."""
    packing = Packing([sizes.num_tokens], device=device)
    yield from delta_cases(sizes, packing)
    yield from attention_cases(sizes, packing)


def delta_cases(sizes: PromptSizes, packing: Packing) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """From the inputs that our kernels prepare, in fp32, and from a state."""
    device, num_tokens, dim = packing.device, sizes.num_tokens, sizes.head_dim
    q, k = (l2_norm(torch.randn(num_tokens, sizes.key_heads, dim, device=device)) for _ in range(2))
    v = torch.randn(num_tokens, sizes.heads, dim, device=device)
    g, beta = -0.1 * torch.rand(v.shape[:2], device=device), torch.rand(v.shape[:2], device=device)
    inputs, states = DeltaInputs(q, k, v, g, beta), torch.zeros(1, sizes.heads, dim, dim, device=device)
    num_bytes = sum(x.nbytes for x in (*inputs, v, states, states))
    name, how = f"delta rule, a prompt of {num_tokens}", {"packing": packing, "initial_state_NHKV": states}
    yield name, num_bytes, lambda: gpu.chunked_delta_rule(inputs, **how)
    rule = gpu.prompt_rule(device)
    if rule is not None and dim == 128:
        yield f"{name}, {rule.package}", num_bytes, lambda: rule(inputs, **how)


def attention_cases(sizes: PromptSizes, packing: Packing) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    device, num_tokens, dim, page_size = packing.device, sizes.num_tokens, sizes.attention_dim, 16
    num_pages = -(-num_tokens // page_size)
    norm_K = torch.ones(dim, device=device, dtype=torch.bfloat16)
    weights = AttentionWeights(norm_K, norm_K, 1e-6, True, True, dim**-0.5)
    shape = (num_pages, sizes.kv_heads, page_size, dim)
    pages = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
    tables_NM, places_T = torch.arange(num_pages, device=device)[None], torch.arange(num_tokens, device=device)
    own = AttentionCache(*pages, None, None, tables_NM, torch.tensor([num_tokens]), places_T)
    widths = (2 * sizes.query_heads, sizes.kv_heads, sizes.kv_heads)
    rows = [torch.randn(num_tokens, n * dim, device=device).bfloat16() for n in widths]
    rope = Rope(*(torch.ones(num_tokens, dim // 8, device=device) for _ in range(2)))
    num_bytes = sum(x.nbytes for x in (*rows, *pages)) + rows[0].nbytes // 2

    def call(cache: AttentionCache) -> Callable[[], Any]:
        return lambda: gpu.attention_mixer(*rows, weights, rope=rope, packing=packing, cache=cache)

    name = f"attention_mixer, a prompt of {num_tokens}"
    yield name, num_bytes, call(own)
    attention = gpu.piece_attention(device)
    if attention is not None and dim == 256:
        yield f"{name}, {attention.package}", num_bytes, call(own._replace(host_lengths=(num_tokens,)))
