"""What a step of tokens does: bytes that it reads, operations that it computes, layers that it passes. No torch.

A load times seconds for each of its units is a time (speed_model.py); the same units over published or measured peaks
are a bound.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from qnext.config import ModelConfig
from qnext.planning.counts import distinct_experts, kv_bytes_per_token, state_bytes_per_sequence
from qnext.planning.expert_memory import ExpertSizes
from qnext.planning.flops import DeltaForm, prefill_flops, token_flops
from qnext.planning.parameters import list_parameters


class StoredSizes(NamedTuple):
    """Bytes of a model as it lies on disk. `dense_bytes` are of what every token multiplies; `experts` are routed ones
    of the trunk, which `can_stream` where they lie in records."""

    dense_bytes: int
    experts: ExpertSizes
    can_stream: bool

    @property
    def weight_bytes(self) -> int:
        return self.experts.all_bytes + self.experts.other_bytes


class Peaks(NamedTuple):
    """The most that a machine does in a second: bytes that it reads, operations on weights of the model's precision."""

    bandwidth: float
    operations: float


class StepLoad(NamedTuple):
    """Of one step, or of several with all their tokens. `row_numbers` are numbers that go into and out of matrices.
    `expert_calls` count each expert of a layer that is used. Keys and values count where they are read back.
    `cold_bytes` and `cold_kv_bytes` are those of the weights and of keys and values that come from memory, where the
    others are in the processor's cache: of all that every token passes it keeps its size."""

    steps: float
    linear_layers: float
    full_layers: float
    weight_bytes: float
    matrix_operations: float
    row_numbers: float
    attention_operations: float
    kv_bytes: float
    delta_operations: float
    state_bytes: float
    expert_calls: float
    cold_bytes: float
    cold_kv_bytes: float

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.state_bytes

    @property
    def operations(self) -> float:
        return self.matrix_operations + self.attention_operations + self.delta_operations


def read_bytes(config: ModelConfig, sizes: StoredSizes, num_tokens: int) -> float:
    """Of the weights that a step of so many tokens reads: of the trunk and the head, and each used expert once."""
    experts = sizes.experts
    return sizes.dense_bytes + experts.num_layers * _touched(config, sizes, num_tokens) * experts.record_bytes


def _touched(config: ModelConfig, sizes: StoredSizes, num_tokens: int) -> float:
    return distinct_experts(sizes.experts.num_experts, config.num_experts_per_tok, num_tokens)


def sequence_bytes(config: ModelConfig, context: int) -> int:
    """That a step reads and writes of one sequence: keys and values read, states read and written."""
    return context * kv_bytes_per_token(config) + 2 * state_bytes_per_sequence(config).total


def decode_load(
    config: ModelConfig, sizes: StoredSizes, *, context: int, batch: int = 1, cache_bytes: int = 0
) -> StepLoad:
    """Of a step in which `batch` sequences go on by one token behind `context` tokens, beside such a cache."""
    flops = token_flops(config, context=context)
    weights, kv = read_bytes(config, sizes, batch), batch * context * kv_bytes_per_token(config)
    states = batch * state_bytes_per_sequence(config).total
    cold_share = max(0.0, 1 - cache_bytes / max(1, sizes.weight_bytes + kv + states))
    return StepLoad(
        1,
        config.num_linear_layers,
        config.num_full_layers,
        weights,
        batch * (flops.total - flops.cores),
        batch * row_numbers(config),
        batch * flops.attention_core,
        kv,
        batch * flops.delta_core,
        2 * states,
        sizes.experts.num_layers * _touched(config, sizes, batch),
        weights * cold_share,
        kv * cold_share,
    )


def prefill_load(
    config: ModelConfig, sizes: StoredSizes, *, num_tokens: int, chunk: int, form: DeltaForm = "recurrent"
) -> StepLoad:
    """Of the steps in which a prompt is read, `chunk` tokens in each."""
    flops = prefill_flops(config, num_tokens, form=form)
    lengths = [min(chunk, num_tokens - first) for first in range(0, num_tokens, chunk)]
    steps = len(lengths)
    return StepLoad(
        steps,
        steps * config.num_linear_layers,
        steps * config.num_full_layers,
        sum(read_bytes(config, sizes, length) for length in lengths),
        flops.total - flops.cores,
        num_tokens * row_numbers(config),
        flops.attention_core,
        0,
        flops.delta_core,
        steps * 2 * state_bytes_per_sequence(config).total,
        sum(sizes.experts.num_layers * _touched(config, sizes, length) for length in lengths),
        0.0,
        0.0,
    )


def row_numbers(config: ModelConfig) -> float:
    """Numbers that a token brings to the matrices of the trunk's layers and takes from them."""
    total = 0.0
    for info in list_parameters(config).values():
        shape = info.block_shape
        if info.layer is None or info.part == "mtp" or len(shape) != 2:
            continue
        share = 1 if info.expert_axis is None else config.num_experts_per_tok
        total += share * sum(shape)
    return total


def bound_seconds(load: StepLoad, peaks: Peaks) -> float:
    """The longer of reading everything at the memory's rate and of computing everything at the processor's."""
    return max(load.num_bytes / peaks.bandwidth, load.operations / peaks.operations)


def expert_share(config: ModelConfig, num_tokens: int) -> float:
    """Of the experts of a layer that a step of so many tokens reads."""
    if not config.num_experts:
        return 0.0
    return distinct_experts(config.num_experts, config.num_experts_per_tok, num_tokens) / config.num_experts


def mtp_bytes(config: ModelConfig, stored: int, num_tokens: int) -> float:
    """That a pass of so many tokens reads of the MTP module, whose weights are `stored` bytes, without the head."""
    infos = [info for info in list_parameters(config).values() if info.part == "mtp"]
    routed = sum(prod(info.shape) for info in infos if info.expert_axis is not None)
    everything = sum(prod(info.shape) for info in infos)
    return stored * (everything - routed * (1 - expert_share(config, num_tokens))) / everything
