"""Backward of the micro batches of a step, one after another, side by side on threads, or shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.training.config import TrainConfig
from qnext.training.health import HealthProbe
from qnext.training.objective import Losses, Objective, TrainStep
from qnext.training.ranks import ALONE, TrainingRanks
from qnext.training.threads import BackwardThreads


class StepLosses(NamedTuple):
    """The losses of a step, and the tokens that each expert of each router got in it."""

    values: Mapping[str, Tensor]
    counts_LE: Tensor | None


class Accumulation:
    """Adds up the gradients of a step. Raises UsageError where its micro batches cannot be divided so."""

    def __init__(self, model: CausalLM, objective: Objective, config: TrainConfig, ranks: TrainingRanks) -> None:
        self._model, self._objective, self._ranks = model, objective, ranks
        self._size = config.parallel_batches * ranks.num_shares  # of the micro batches that run at once
        self._threads = BackwardThreads(config.parallel_batches) if config.parallel_batches > 1 else None
        if ranks is not ALONE and self._threads is not None:
            raise UsageError(
                f"parallel_batches={config.parallel_batches}: each of several processes computes one micro batch at a "
                "time; set it to 1"
            )
        if ranks.num_cuts > 1 and config.mtp_steps > 1:
            raise UsageError(
                f"mtp_steps={config.mtp_steps}: drafts in a row need all rows of a micro batch in a process"
            )
        if config.accumulation % self._size:
            raise UsageError(
                f"accumulation={config.accumulation}: the micro batches of a step are divided among {ranks.num_shares} "
                f"processes; set it to a multiple"
            )

    def backward(
        self, step: TrainStep, parameters: Sequence[nn.Parameter], *, is_bfloat16: bool, probe: HealthProbe | None
    ) -> StepLosses:
        """Of every micro batch. `probe` looks at the first one."""
        per_batch: list[Losses] = []
        counts_LE: Tensor | None = None
        ranks = self._ranks
        for start in range(0, len(step.batches), self._size):
            at = step._replace(counts_LE=counts_LE, ranks=ranks)
            own = step.batches[start : start + self._size]
            if ranks.num_shares > 1:
                own = own[ranks.share : ranks.share + 1]
            watched = own[0] if probe is not None and start == 0 else None
            tasks = [
                partial(self._losses, batch, at, is_bfloat16, probe if batch is watched else None) for batch in own
            ]
            group = self._backward(tasks, parameters)
            per_batch += group
            for losses in group:
                if losses.counts_LE is not None:
                    counts_LE = losses.counts_LE if counts_LE is None else counts_LE + losses.counts_LE
        return StepLosses(self._sums(per_batch), counts_LE)

    def _losses(self, batch: Any, step: TrainStep, is_bfloat16: bool, probe: HealthProbe | None) -> Losses:
        device = self._model.device
        if probe is not None:
            probe.watch_thread()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
            losses = self._objective(self._model, self._own_rows(batch.to(device)), step)
        step.tap.take()  # where the objective has not looked at the routers
        return losses

    def _own_rows(self, batch: Any) -> Any:
        """What this process computes of a micro batch."""
        return batch if self._ranks.num_cuts == 1 else batch.cut(self._ranks)

    def _backward(self, tasks: Sequence[Callable[[], Losses]], parameters: Sequence[nn.Parameter]) -> list[Losses]:
        if self._threads is not None:
            return self._threads.backward(tasks, parameters)
        (task,) = tasks
        losses = task()
        losses.total.backward()
        return [losses]

    def _sums(self, per_batch: Sequence[Losses]) -> dict[str, Tensor]:
        """The losses of all micro batches, added in their order whoever computed them."""
        is_maximum = {name: part.is_maximum for losses in per_batch for name, part in losses.parts.items()}
        total: dict[str, Tensor] = {}
        for values in self._of_all_ranks(per_batch):
            for name, value in values.items():
                combine = torch.maximum if is_maximum[name] else torch.add
                total[name] = combine(total[name], value) if name in total else value
        return total

    def _of_all_ranks(self, per_batch: Sequence[Losses]) -> Iterator[Mapping[str, Tensor]]:
        if self._ranks is ALONE:
            yield from (losses.values for losses in per_batch)
            return
        own_BN = torch.stack([torch.stack(list(losses.values.values())) for losses in per_batch])
        all_RBN = self._ranks.gather(own_BN.flatten()).view(-1, *own_BN.shape)
        for values_N in all_RBN.transpose(0, 1).flatten(0, 1):
            yield dict(zip(per_batch[0].parts, values_N, strict=True))
