"""What a training run takes: operations, hours, machines, and the memory of each of them. No torch.

Weights, gradients and optimiser states are divided among all ranks (FSDP), and a rank gathers one layer and the next
one at a time; with expert parallelism of M it gathers an M-th of their experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

from qnext.config import ModelConfig
from qnext.planning.accelerators import GPUS_OF_NODE, USABLE_SHARE
from qnext.planning.counts import count_parameters
from qnext.planning.flops import ForwardFlops, token_flops, training_flops
from qnext.planning.parameters import list_parameters
from qnext.planning.workspace import attention_numbers, delta_numbers

KINDS = ("pretrain", "sft", "lora")
_LOSS_ROWS = 1024  # whose logits are there at once, in fp32, with their gradient
_MOST_RANKS = 1 << 16
_RESERVE = 2 << 30  # of a rank: the runtime, buffers of its messages
_DELTA_TOKENS = 32  # the native kernels keep a state of the delta rule behind every so many tokens
# Of training with the native kernels, measured (docs/log.md): tensors of the backward pass and holes in the heap take
# what so many layers keep, with recomputation twice as much; modules and threads take the rest.
_HOLES_LAYERS, _PROGRAM_BYTES = 2, 64 << 20


class TrainedBytes(NamedTuple):
    """Of each trained number: weight, gradient, copy of the weight in fp32, moments of the optimiser."""

    weight: int
    gradient: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        return sum(self)


# As frameworks keep them; "fp32" is how qnext trains on a processor.
STATES = {
    "adamw": TrainedBytes(2, 4, 4, 8),
    "adamw-bf16-gradients": TrainedBytes(2, 2, 4, 8),
    "adamw-bf16": TrainedBytes(2, 2, 4, 4),
    "muon": TrainedBytes(2, 4, 4, 4),
    "muon-bf16": TrainedBytes(2, 2, 4, 2),
    "fp32": TrainedBytes(4, 4, 0, 8),
}


@dataclass(frozen=True)
class TrainingWish:
    """A run. `tokens` are those of all epochs; `adapter_parameters` are trained instead of the model's where the kind
    is lora, on weights of `frozen_bytes`. `mfu` is the assumed share of the peak."""

    kind: str
    tokens: float
    sequence_length: int
    mfu: float
    states: str = "adamw"
    recomputes: bool = False
    sequences: int = 1  # of a rank at once
    expert_parallel: int = 1
    adapter_parameters: int = 0
    frozen_bytes: int = 0


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int
    workspace: int  # of the backward pass and its allocator, where that was measured

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class TrainingPlan:
    """`flops` are of a token; hours and memory are of one rank of `num_ranks`. `least_ranks` is None where even many
    do not suffice."""

    wish: TrainingWish
    flops: ForwardFlops
    trained_parameters: int
    state_bytes: int
    num_ranks: int
    memory: TrainingMemory
    least_ranks: int | None
    device_hours: float

    @property
    def total_flops(self) -> float:
        return self.flops.total * self.wish.tokens

    @property
    def days(self) -> float:
        return self.device_hours / self.num_ranks / 24

    @property
    def nodes(self) -> int:
        return ceil(self.num_ranks / GPUS_OF_NODE)

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {
            **vars(self.wish),
            "flops_of_token": {**vars(self.flops), "total": self.flops.total},
            "total_flops": self.total_flops,
            "trained_parameters": self.trained_parameters,
            "state_bytes": self.state_bytes,
            "num_ranks": self.num_ranks,
            "nodes": self.nodes,
            "memory_of_rank": {**vars(self.memory), "total": self.memory.total},
            "least_ranks": self.least_ranks,
            "device_hours": self.device_hours,
            "days": self.days,
        }


def plan_training(
    config: ModelConfig, wish: TrainingWish, *, peak: float, memory_bytes: int, num_ranks: int | None
) -> TrainingPlan:
    """On devices of `peak` operations in a second and so much memory: `num_ranks`, or the least that suffice."""
    flops = _flops(config, wish)
    trained = wish.adapter_parameters if wish.kind == "lora" else count_parameters(config).total
    least = _least_ranks(config, wish, int(memory_bytes * USABLE_SHARE) - _RESERVE)
    ranks = num_ranks or least or _MOST_RANKS
    return TrainingPlan(
        wish,
        flops,
        trained,
        trained * STATES[wish.states].total,
        ranks,
        rank_memory(config, wish, ranks),
        least,
        flops.total * wish.tokens / (wish.mfu * peak) / 3600,
    )


def _flops(config: ModelConfig, wish: TrainingWish) -> ForwardFlops:
    """An adapter spares the gradients of the weights: of their three passes one, of the cores none."""
    full = training_flops(config, sequence_length=wish.sequence_length, recomputes=wish.recomputes)
    if wish.kind != "lora":
        return full
    context = (wish.sequence_length + 1) / 2
    forward = token_flops(config, context=context, form="chunked", with_mtp=True)
    spared = ForwardFlops(**{**vars(forward), "attention_core": 0, "delta_core": 0})
    return ForwardFlops(**{name: count - getattr(spared, name) for name, count in vars(full).items()})


def rank_memory(config: ModelConfig, wish: TrainingWish, num_ranks: int) -> TrainingMemory:
    """Of one of so many ranks."""
    each, is_fused = STATES[wish.states], wish.states == "fp32"
    everything = count_parameters(config).total
    trained = wish.adapter_parameters if wish.kind == "lora" else everything
    frozen = wish.frozen_bytes if wish.kind == "lora" else 0
    width = 4 if wish.states == "fp32" else 2
    gathered = 0 if num_ranks == 1 else 2 * _layer_parameters(config, wish.expert_parallel) * width
    tokens = wish.sequences * wish.sequence_length
    return TrainingMemory(
        weights=(frozen + trained * each.weight) // num_ranks,
        gradients=trained * each.gradient // num_ranks,
        optimizer=trained * (each.master + each.moments) // num_ranks,
        gathered=gathered,
        activations=tokens * width * activation_numbers(config, recomputes=wish.recomputes, is_fused=is_fused),
        loss=2 * 4 * min(tokens, _LOSS_ROWS) * config.vocab_size,
        workspace=_workspace_bytes(config, tokens, recomputes=wish.recomputes) if is_fused else 0,
    )


def _workspace_bytes(config: ModelConfig, tokens: int, *, recomputes: bool) -> int:
    widest = max(_fused_numbers(config, layer) for layer in range(config.num_hidden_layers))
    layers = _HOLES_LAYERS * (2 if recomputes else 1)
    return layers * 4 * tokens * widest + _PROGRAM_BYTES


def activation_numbers(config: ModelConfig, *, recomputes: bool, is_fused: bool = False) -> int:
    """Numbers of a token that wait for the backward pass: of all layers, or with `recomputes` their inputs and one
    layer's own. `is_fused`: as the native kernels of training keep them, which is exact."""
    numbers = _fused_numbers if is_fused else _layer_numbers
    layers = [numbers(config, layer) for layer in range(config.num_hidden_layers)]
    rest = config.hidden_size + 1 + 2 + config.rotary_dim  # the last norm, the id, the rotation
    if config.num_nextn_predict_layers:
        layers.append(numbers(config, config.num_hidden_layers - 1) if is_fused else max(layers))
        rest += rest + 4 * config.hidden_size + 2  # norms of both inputs, and these side by side
    return len(layers) * config.hidden_size + max(layers) if recomputes else sum(layers) + (rest if is_fused else 0)


def _layer_numbers(config: ModelConfig, layer: int) -> int:
    """Input, both norms, the sum between; the mixer's tensors; those of the feed-forward."""
    is_linear = config.layer_types[layer] == "linear_attention"
    mixer = sum(delta_numbers(config) if is_linear else attention_numbers(config))
    if config.is_moe_layer(layer):
        routed = config.num_experts_per_tok * (3 * config.moe_intermediate_size + config.hidden_size)
        feed_forward = config.num_experts + routed + 3 * config.shared_expert_intermediate_size
    else:
        feed_forward = 3 * config.intermediate_size
    return 4 * config.hidden_size + mixer + feed_forward


def _fused_numbers(config: ModelConfig, layer: int) -> int:
    """What the kernels of a layer keep: inputs of norms and projections, and what their backward reads. Router losses
    keep the probabilities of all experts twice. An index of 8 bytes counts as two numbers."""
    hidden = config.hidden_size
    if config.layer_types[layer] == "linear_attention":
        heads, values = config.linear_num_value_heads, config.linear_value_dim
        states = heads * config.linear_key_head_dim * config.linear_value_head_dim // _DELTA_TOKENS
        mixer = 2 * config.linear_key_dim + 5 * values + 4 * heads + states
    else:
        query_dim = config.num_attention_heads * config.head_dim
        # Queries, their gate and its result; the output as the kernel has it.
        mixer = (4 if config.attention_output_gate else 3) * query_dim + config.num_attention_heads
        mixer += 2 * config.num_key_value_heads * config.head_dim
    if config.is_moe_layer(layer):
        routed = config.num_experts_per_tok * (3 + 2 * config.moe_intermediate_size)
        feed_forward = 3 * config.num_experts + 1 + routed + 2 * config.shared_expert_intermediate_size + 1
    else:
        feed_forward = 4 * config.intermediate_size
    return 2 * (hidden + 1) + hidden + mixer + hidden + feed_forward


def _layer_parameters(config: ModelConfig, expert_parallel: int) -> int:
    """Of the largest layer, of whose experts a rank computes a share."""
    sizes: dict[int, int] = {}
    for info in list_parameters(config).values():
        if info.layer is not None:
            share = expert_parallel if info.expert_axis is not None else 1
            sizes[info.layer] = sizes.get(info.layer, 0) + prod(info.shape) // share
    return max(sizes.values())


def _least_ranks(config: ModelConfig, wish: TrainingWish, usable: int) -> int | None:
    """A power of two."""
    ranks = 1
    while ranks <= _MOST_RANKS:
        if rank_memory(config, wish, ranks).total <= usable:
            return ranks
        ranks *= 2
    return None
