"""The processes of a run, as one of them sees them: `TrainingRanks`; `Alone` is a run in one process.

Legend: R processes, N numbers, L routers, E experts, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qnext.checkpoint.cut import RankRows
from qnext.config import ModelConfig
from qnext.model import Batch, CausalLM, initialize


class TrainingRanks(Protocol):
    """What processes that train one model together do otherwise than one. All call the same in the same order.

    Each draws all micro batches of a step and computes its share of them. Parameters may be cut: each process has a
    part of each, and updates it.
    """

    @property
    def share(self) -> int:
        """Of `num_shares` micro batches in a row, this one is the process's."""

    @property
    def num_shares(self) -> int: ...

    @property
    def num_cuts(self) -> int:
        """How many processes share the rows of one micro batch."""

    @property
    def is_first(self) -> bool:
        """Whether it is the process that writes files and talks to people."""

    @property
    def num_here(self) -> int:
        """How many of them share the memory of this machine."""

    @property
    def aside(self) -> TrainingRanks:
        """The same processes, which talk apart from training: for a thread beside it."""

    @property
    def group(self) -> Any:
        """That of torch.distributed in which they talk; None for one process."""

    def new_model(self, config: ModelConfig, *, seed: int) -> CausalLM:
        """With the initial values of `initialize`, and cut parameters. No process makes the whole."""

    def filled_model(self, config: ModelConfig, fill: Callable[[CausalLM, RankRows | None], None]) -> CausalLM:
        """With values that are read, and cut parameters. `fill` gets a model whose parameters are what this process has
        of them, and which rows these are; None: all."""

    def shard(self, model: CausalLM) -> None:
        """Cut the parameters of `model`, before anything else looks at them."""

    def cut_again(self, model: CausalLM) -> None:
        """After a forward pass that no backward pass follows, for which some parameters would stay whole."""

    def rows(self, num_rows: int) -> tuple[int, int]:
        """The rows of a micro batch that this process computes."""

    def cut_rows(self, batch: Batch) -> Batch:
        """These rows, for a model that will be told of those before them."""

    def gather(self, values_N: Tensor) -> Tensor:
        """[shares, N]: numbers of the micro batches that run side by side, in the order of the shares. What the rows of
        one micro batch have is added up."""

    def add_cuts(self, values: Tensor) -> Tensor:
        """The sum over the processes that share the rows of this one's micro batch. It has no gradient."""

    def gather_parts(self, values_N: Tensor) -> Tensor:
        """[R, N]: numbers of the parts of all processes. Every element of a parameter is in one part."""

    def part(self, parameter: nn.Parameter) -> nn.Parameter:
        """The part of a parameter of the model. It shares its memory."""

    def collect_gradients(self) -> None:
        """Move the gradients of the model's parameters to the parts."""

    def shape(self, part: Tensor) -> torch.Size:
        """Of the parameter that is cut."""

    def whole(self, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors that are cut as the parameters of these parts are, and have one shape."""

    def value(self, parameter: Tensor) -> Tensor:
        """All of a parameter of the model, which may be cut. All processes ask, and all have it then."""

    def cut(self, tensor: Tensor, part: Tensor) -> Tensor:
        """The inverse of `whole` for one tensor."""

    def placed(self, tensor: Tensor, part: Tensor) -> Tensor:
        """A tensor that is cut as this part is, with its place in the whole: a DTensor, which shares its memory."""

    def told(self, text: str) -> str:
        """What the first process says: its `text`, of at most 4096 bytes."""

    def gather_objects(self, value: Any) -> list[Any]:
        """What all processes have, in their order. It is pickled."""

    def by_first(self, action: Callable[[], object]) -> None:
        """Do something in the first process alone. The others wait; where it fails, all fail."""

    def guarded(self) -> AbstractContextManager[object]:
        """While this is open, an error that comes of a lost process is LostRank."""


class Alone:
    """One process."""

    share, num_shares, num_cuts, num_here, is_first, group = 0, 1, 1, 1, True, None

    @property
    def aside(self) -> Alone:
        return self

    def new_model(self, config: ModelConfig, *, seed: int) -> CausalLM:
        model = CausalLM(config)
        initialize(model, seed=seed)
        return model

    def filled_model(self, config: ModelConfig, fill: Callable[[CausalLM, RankRows | None], None]) -> CausalLM:
        model = CausalLM(config)
        fill(model, None)
        return model

    def shard(self, model: CausalLM) -> None:
        """Nothing is cut."""

    def cut_again(self, model: CausalLM) -> None:
        """Nothing is cut."""

    def rows(self, num_rows: int) -> tuple[int, int]:
        return 0, num_rows

    def cut_rows(self, batch: Batch) -> Batch:
        return batch

    def gather(self, values_N: Tensor) -> Tensor:
        return values_N[None]

    def add_cuts(self, values: Tensor) -> Tensor:
        return values.detach()

    def gather_parts(self, values_N: Tensor) -> Tensor:
        return values_N[None]

    def part(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def collect_gradients(self) -> None:
        """They are there."""

    def shape(self, part: Tensor) -> torch.Size:
        return part.shape

    def whole(self, tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def value(self, parameter: Tensor) -> Tensor:
        return parameter

    def cut(self, tensor: Tensor, part: Tensor) -> Tensor:
        return tensor

    def placed(self, tensor: Tensor, part: Tensor) -> Tensor:
        return tensor

    def told(self, text: str) -> str:
        return text

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def by_first(self, action: Callable[[], object]) -> None:
        action()

    def guarded(self) -> AbstractContextManager[object]:
        return nullcontext()


ALONE = Alone()
Made = TypeVar("Made")


def first_then_all(ranks: TrainingRanks, make: Callable[[bool], Made]) -> Made:
    """What `make`, which is told whether it is in the first process, gives: first there, where it may write files, and
    then in the others, which find them."""
    made: list[Made] = []
    ranks.by_first(lambda: made.append(make(True)))
    return made[0] if ranks.is_first else make(False)


def total_norm(gradients: Sequence[Tensor], ranks: TrainingRanks) -> Tensor:
    """The norm of the gradients of all parts together."""
    norms_P = torch.stack(torch._foreach_norm(list(gradients)))
    return torch.linalg.vector_norm(ranks.gather_parts(norms_P))


@torch.no_grad()
def whole_model(model: CausalLM, part_of: Mapping[str, Tensor], ranks: TrainingRanks) -> CausalLM:
    """`model` with all its parameters, in the first process. All take part, one parameter after another; in the others
    they have no values."""
    if ranks is ALONE:
        return model
    whole = CausalLM(model.config)
    for name, target in whole.named_parameters():
        (value,) = ranks.whole([part_of[name]], [part_of[name]])
        if ranks.is_first:
            target.copy_(value)
    return whole
