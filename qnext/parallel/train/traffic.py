"""What the ranks of a training run send each other in a step, from the configuration alone. No torch.

All numbers are bytes that all ranks together send. What goes to several ranks counts for each of them.

Legend: R ranks, M of them share the experts, C of them share the rows of a micro batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import NamedTuple

from qnext.config import ModelConfig
from qnext.planning import ParameterInfo, list_parameters

_WIDE = 4  # bytes of a state, a loss or a norm
_COUNT = 8  # of an integer, and of a number of the clock


class TrainShape(NamedTuple):
    """A run: its ranks, and the micro batches of a step, of so many rows each. `num_losses` are
    reported; `matrices` are the parameters whose updates Muon gathers. Bytes are those of a number."""

    num_ranks: int
    tokens: int
    accumulation: int
    expert: int = 1
    context: int = 1
    recomputes: bool = False
    num_losses: int = 4
    matrices: Collection[str] = ()
    weight_bytes: int = 4
    gradient_bytes: int = 4
    value_bytes: int = 4  # of activations

    @property
    def rounds(self) -> int:
        """Micro batches that a rank takes part in."""
        return self.accumulation * self.context // self.num_ranks


@dataclass(frozen=True)
class StepTraffic:
    """Of one step: `parameters` are gathered for the forward and again for the backward pass, `gradients` summed;
    `experts` and `rows` are of --expert-parallel and --context-parallel, with their gradients; `numbers` are counts,
    losses and norms, and `updates` what Muon gathers.

    Tokens are taken to be routed evenly, and the MTP module to run once. The health of a run is not counted.
    """

    parameters: int
    gradients: int
    experts: int
    rows: int
    numbers: int
    updates: int

    @classmethod
    def of(cls, config: ModelConfig, shape: TrainShape) -> StepTraffic:
        infos = list_parameters(config)
        sent = {name: _sent_part(info, shape) for name, info in infos.items()}
        # Embedding, head and final norm stay from the forward pass.
        of_layers = sum(sent[name] for name, info in infos.items() if info.layer is not None)
        everything, every = sum(sent.values()), shape.rounds * shape.num_ranks
        return cls(
            parameters=every * (everything + of_layers) * shape.weight_bytes,
            gradients=every * everything * shape.gradient_bytes,
            experts=shape.rounds * shape.num_ranks * _experts(config, shape),
            rows=shape.accumulation * _rows(config, shape),
            numbers=shape.num_ranks * (shape.num_ranks - 1) * _numbers(config, shape, len(infos)),
            updates=shape.num_ranks * sum(sent[name] for name in shape.matrices) * shape.gradient_bytes,
        )

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.experts + self.rows + self.numbers + self.updates

    def document(self) -> dict[str, int]:
        """For programs."""
        return {**asdict(self), "total": self.total}


def _sent_part(info: ParameterInfo, shape: TrainShape) -> int:
    """Numbers that a rank sends when all that have cut a parameter gather it. Parts are as large as the largest."""
    dealt = shape.expert if info.expert_axis is not None else 1
    size = shape.num_ranks // dealt
    rows, *more = info.shape
    return -(-rows // dealt // size) * prod(more) * (size - 1)


def _routers(config: ModelConfig) -> int:
    drafts = bool(config.num_nextn_predict_layers) and config.num_experts > 0
    return sum(map(config.is_moe_layer, range(config.num_hidden_layers))) + drafts


def _experts(config: ModelConfig, shape: TrainShape) -> int:
    """Of a rank in a micro batch: rows to experts and back, the gradients of both, and before them the counts."""
    if shape.expert == 1:
        return 0
    away = shape.tokens // shape.context * config.num_experts_per_tok * (shape.expert - 1) // shape.expert
    counts = config.num_experts * (shape.expert - 1) // shape.expert * _COUNT
    forwards = 2 if shape.recomputes else 1
    way = away * config.hidden_size * shape.value_bytes
    return _routers(config) * (forwards * (2 * way + counts) + 2 * way)


def _rows(config: ModelConfig, shape: TrainShape) -> int:
    """Of all ranks of a micro batch: states from rank to rank, keys and values to all, and their gradients."""
    passes = 3 if shape.recomputes else 2
    return passes * (shape.context - 1) * sum(_cut_layers(config, shape.tokens, shape.value_bytes))


def _cut_layers(config: ModelConfig, tokens: int, value_bytes: int) -> Iterator[int]:
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    tail = (config.linear_conv_kernel_dim - 1) * (2 * config.linear_key_dim + config.linear_value_dim)
    yield config.num_linear_layers * (state * _WIDE + tail * value_bytes)
    num_full = config.num_full_layers + (config.num_nextn_predict_layers > 0)
    yield num_full * 2 * tokens * config.num_key_value_heads * config.head_dim * value_bytes


def _numbers(config: ModelConfig, shape: TrainShape, num_parameters: int) -> int:
    """To each other rank: the tokens of every expert, the losses, the norms of all parts, the clock and a wish to
    stop."""
    counts = shape.rounds * _routers(config) * config.num_experts * _COUNT
    return counts + shape.rounds * shape.num_losses * _WIDE + num_parameters * _WIDE + 2 * _COUNT
