"""Which experts the tokens of an engine went to, counted where routers choose them.

Legend: L routers, E experts, S steps that are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qnext.config import ModelConfig
from qnext.planning.expert_shape import expert_shape

_HISTORY = 64  # steps


@dataclass(frozen=True)
class LayerLoad:
    """Tokens of each expert of one layer; the MTP layer's index is that after the trunk's.

    `entropy` is that of `tokens` over its largest possible value ln E: 1 is balanced, and also what no token at all
    has. `num_dead` experts have had no token.
    """

    layer_index: int
    tokens: tuple[int, ...]  # since the engine was made
    recent: tuple[int, ...]  # in the last steps
    entropy: float
    num_dead: int


@dataclass(frozen=True)
class ExpertLoad:
    """Load of the experts of every sparse layer. All numbers are plain Python's.

    Computed work is counted: a token counts again when it is computed again after a preemption, and so do drafted
    tokens that turn out wrong. Over the experts of a layer of the trunk the sum is top-k times the tokens computed.
    """

    num_steps: int  # since the engine was made; whoever polls asks for those that came since
    num_recent_steps: int  # that `recent` is about
    layers: tuple[LayerLoad, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ExpertCounter:
    """Counters that routers write to, and what they were at the end of each step.

    A step costs one copy of the counters, on their device. The last 64 are remembered: 13 MB for 48 layers of 512
    experts. Only `copy` waits for the device.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        layers = [index for index in range(config.num_hidden_layers) if config.is_moe_layer(index)]
        if config.num_nextn_predict_layers and config.num_experts:
            layers.append(config.num_hidden_layers)
        self._counts_LE = torch.zeros(len(layers), config.num_experts, dtype=torch.int64, device=device)
        self._layers = layers
        # row s: the counters after step s, for the last steps
        self._history_SLE = torch.zeros(_HISTORY + 1, *self._counts_LE.shape, dtype=torch.int64, device=device)
        here = device.type == "cpu"  # where numpy copies in a tenth of the time that torch takes
        self._shared = (self._counts_LE.numpy(), self._history_SLE.numpy()) if here else None
        self._num_steps = 0

    @property
    def of_layer(self) -> Mapping[int, Tensor]:
        """int64 [E] of each sparse layer, for `CacheView.expert_load`. Always the same memory."""
        return dict(zip(self._layers, self._counts_LE.unbind(), strict=True))

    def end_step(self) -> None:
        """Book what was counted since the last step as the next one's."""
        self._num_steps += 1
        if self._shared is None:
            self._after(self._num_steps).copy_(self._counts_LE)
        else:
            counts_LE, history_SLE = self._shared
            np.copyto(history_SLE[self._num_steps % (_HISTORY + 1)], counts_LE)

    def drop_step(self) -> None:
        """Forget what was counted since the last step: it failed."""
        self._counts_LE.copy_(self._after(self._num_steps))

    def copy(self, num_steps: int) -> ExpertCounts:
        """The state after the last step, with the sum over the last `num_steps`, or as many as are remembered."""
        num_recent = max(0, min(num_steps, self._num_steps, _HISTORY))
        rows_LE = (self._after(step) for step in (self._num_steps, self._num_steps - num_recent))
        total_LE, before_LE = torch.stack(list(rows_LE)).numpy(force=True)
        return ExpertCounts(self._layers, self._num_steps, num_recent, total_LE, total_LE - before_LE)

    def _after(self, step: int) -> Tensor:
        return self._history_SLE[step % (_HISTORY + 1)]


@dataclass(frozen=True)
class ExpertCounts:
    """A copy of an ExpertCounter's state, cheap to take. Row i of the arrays is the layer with index `layers[i]`."""

    layers: list[int]
    num_steps: int
    num_recent_steps: int
    total_LE: NDArray[np.int64]
    recent_LE: NDArray[np.int64]

    def report(self) -> ExpertLoad:
        shape = expert_shape(self.total_LE)
        columns = (self.total_LE, self.recent_LE, shape.entropy_L, shape.num_dead_L)
        rows = zip(self.layers, *(column.tolist() for column in columns), strict=True)
        layers = (LayerLoad(index, tuple(total), tuple(recent), *rest) for index, total, recent, *rest in rows)
        return ExpertLoad(self.num_steps, self.num_recent_steps, tuple(layers))
