"""Bytes that a step takes beside weights and caches: an upper bound, from sizes alone. No torch.

Native kernels compute in fp32 whatever the weights are. The bound counts what exists at the same time in the worst
step: the tensors of a layer between its input and its output, the kernels' own buffers (which grow and stay), the rows
of logits, and the memory of recorded steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from qnext.config import ModelConfig
from qnext.planning.parameters import list_parameters

_FLOAT = 4
_LOGPROB_ROWS = 2 * 128  # of a prompt's logits: a chunk, and the next one while the first is still there
_SAMPLER_BYTES = 64  # per token of the vocabulary, for one row: copies, exponentials in fp64, sorted candidates
_TOKEN_BYTES = 512  # of a step: ids, positions and places as tensors and as Python's integers
_PYTHON_BYTES = 24 << 20  # at most: modules imported on first use, code pages, threads
_TILE_ROWS, _KEY_BLOCK, _GROUP_ROWS, _LANES = 128, 64, 32, 16
_DELTA_TOKENS = 64
_PARTS_BYTES, _LEAST_PARTS = 8 << 20, 4


@dataclass(frozen=True)
class StepSizes:
    """The largest step of an engine: tokens in all, rows that choose a token, sequences, and the longest context."""

    num_tokens: int
    num_rows: int
    num_sequences: int
    max_model_len: int


def step_bytes(config: ModelConfig, sizes: StepSizes, *, num_threads: int, streams_experts: bool = False) -> int:
    """The most that a step takes with native kernels: half as much again for the holes that an allocator leaves.
    Kernels that read experts from disk compute all tokens at once."""
    used = _used_bytes(config, sizes, num_threads, streams_experts)
    return used + used // 2 + _PYTHON_BYTES


def likely_step_bytes(config: ModelConfig, sizes: StepSizes, *, num_threads: int, streams_experts: bool = False) -> int:
    """What it is expected to take: without holes, and without log-probabilities of a prompt."""
    used = _used_bytes(config, sizes, num_threads, streams_experts)
    return used - min(_LOGPROB_ROWS, 2 * sizes.num_tokens) * (config.vocab_size + config.hidden_size) * _FLOAT


def _used_bytes(config: ModelConfig, sizes: StepSizes, num_threads: int, streams_experts: bool) -> int:
    num_tokens = sizes.num_tokens
    return (
        num_tokens * (_FLOAT * _live_floats(config) + _TOKEN_BYTES)
        + _kernel_bytes(config, num_tokens, num_threads)
        + (_streamed_bytes(config, num_tokens) if streams_experts else 0)
        + _logits_bytes(config, sizes)
        + sizes.num_sequences * 8 * 2 * (sizes.max_model_len // 16 + 1)  # page tables
        + _widened_bytes(config)
    )


def recorded_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Bytes that a recorded step of `num_tokens` tokens keeps. Tensors of one size share memory, others do not."""
    mixers = sum(delta_numbers(config)) + sum(attention_numbers(config))
    floats = config.vocab_size + 10 * config.hidden_size + mixers + sum(_feed_forward(config))
    return num_tokens * (_FLOAT * floats + _TOKEN_BYTES) + (64 << 10)


def _live_floats(config: ModelConfig) -> int:
    """Numbers per token at the widest place of a layer, its input and the carried rotations among them."""
    mixers = [sum(delta_numbers(config))] if config.num_linear_layers else []
    mixers += [sum(attention_numbers(config))] if config.num_full_layers else []
    # Mixer: input, normed, its tensors. Feed-forward: these two, the mixer's output, their sum, normed, its tensors.
    widest = max(
        *(2 * config.hidden_size + mixer for mixer in mixers), 5 * config.hidden_size + sum(_feed_forward(config))
    )
    return widest + 2 * config.rotary_dim + config.hidden_size


def delta_numbers(config: ModelConfig) -> Iterator[int]:
    """Of a token, in each tensor of a Gated DeltaNet layer between its input and its output."""
    if config.num_linear_layers:
        yield 2 * config.linear_key_dim + 2 * config.linear_value_dim
        yield 2 * config.linear_num_value_heads
        yield config.linear_value_dim
        yield config.hidden_size


def attention_numbers(config: ModelConfig) -> Iterator[int]:
    """The same of an attention layer."""
    if config.num_full_layers:
        query_dim = config.num_attention_heads * config.head_dim
        yield query_dim * (2 if config.attention_output_gate else 1)
        yield 2 * config.num_key_value_heads * config.head_dim
        yield query_dim
        yield config.hidden_size


def _feed_forward(config: ModelConfig) -> Iterator[int]:
    yield 2 * config.hidden_size
    if config.num_experts:
        yield config.num_experts + 3 * config.num_experts_per_tok
    if not all(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        yield 3 * config.intermediate_size


def _kernel_bytes(config: ModelConfig, num_tokens: int, num_threads: int) -> int:
    """Buffers of the native kernels: those of the thread that calls, then those of every thread."""
    query_dim = config.num_attention_heads * config.head_dim
    value_dim = config.linear_value_dim if config.num_linear_layers else 0
    widest = max(config.hidden_size, query_dim, value_dim, config.intermediate_size)
    # Rounded rows: bf16, or codes with a scale and a correction per group of at least 16.
    total = 2 * num_tokens * 2 * widest + num_tokens * query_dim * _FLOAT + num_tokens * 64
    if config.num_experts:
        total += _expert_bytes(config, num_tokens)
    group = config.num_attention_heads // config.num_key_value_heads
    rows = max(_TILE_ROWS, group) + 8
    sums = rows * (config.head_dim + _LANES + 1) * _FLOAT
    each = 2 * sums + rows * 16 + 2 * (_KEY_BLOCK + 1) * config.head_dim * _FLOAT + _GROUP_ROWS * _KEY_BLOCK * 8
    each += 8 * _LANES * widest  # a panel of weights, unpacked
    if config.num_linear_layers:
        each += config.linear_conv_dim * (_DELTA_TOKENS + 2 * config.linear_conv_kernel_dim) * _FLOAT
    if config.num_full_layers:
        total += max(_PARTS_BYTES, _LEAST_PARTS * 4 * num_threads * sums)
    return total + num_threads * each


def _expert_bytes(config: ModelConfig, num_tokens: int) -> int:
    """What lies between the two products of the experts, for the tokens of a pass."""
    experts, top_k = config.num_experts, config.num_experts_per_tok
    hidden, width, shared = config.hidden_size, config.moe_intermediate_size, config.shared_expert_intermediate_size
    num_tokens = min(num_tokens, 2048, max(256, 32 * experts // top_k))
    inner = num_tokens * (top_k * width + shared)
    products = max(8 * inner, 4 * num_tokens * (top_k + 1) * hidden)
    # Behind the activation: fp32 for weights that want it, else rounded rows; both are counted.
    return products + 4 * inner + 2 * inner + 12 * num_tokens * top_k + (experts + 4) * 96


def _streamed_bytes(config: ModelConfig, num_tokens: int) -> int:
    """What comes out of every expert of every token, beside what lies between the two products of a few experts."""
    return _FLOAT * num_tokens * (config.num_experts_per_tok + 1) * config.hidden_size


def _logits_bytes(config: ModelConfig, sizes: StepSizes) -> int:
    rows = sizes.num_rows + min(_LOGPROB_ROWS, 2 * sizes.num_tokens)
    return rows * (config.vocab_size + config.hidden_size) * _FLOAT + _SAMPLER_BYTES * config.vocab_size


def _widened_bytes(config: ModelConfig) -> int:
    """Small weights of a bf16 model that kernels read in fp32, converted once."""
    infos = list_parameters(config).values()
    small = sum(prod(info.shape) for info in infos if len(info.shape) != 2 and info.expert_axis is None)
    return _FLOAT * (small + config.hidden_size * config.num_hidden_layers)
