"""The best evaluation of a run: when it was, the weights of then, and whether there has been none better for long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qnext.errors import UsageError


@runtime_checkable
class Costed(Protocol):
    """The result of an evaluation that can be compared with others."""

    @property
    def cost(self) -> float:
        """Lower is better."""


class BestModel:
    """The best evaluation so far. With `patience`, so many in a row without a better one end the run, and the weights
    of the best one are kept."""

    def __init__(self, parameters: Mapping[str, Tensor], *, patience: int) -> None:
        self.patience = patience
        self.step: int | None = None  # of the best evaluation
        self.cost = math.inf
        self.weights: dict[str, Tensor] = {}
        self._parameters = parameters
        self._num_since = 0
        self._judged_step = 0

    @property
    def is_over(self) -> bool:
        return 0 < self.patience <= self._num_since

    def judge(self, step: int, result: Any) -> None:
        """Compare the evaluation after `step`, once. Raises UsageError where the run shall end by evaluations that
        cannot be compared."""
        if not isinstance(result, Costed):
            if self.patience:
                raise UsageError("early_stop: the evaluations of this run cannot be compared; set it to 0")
            return
        if step == self._judged_step:
            return
        self._judged_step = step
        self._num_since += 1
        if result.cost < self.cost:
            self.step, self.cost, self._num_since = step, float(result.cost), 0
            if self.patience:
                self.weights = {name: each.detach().clone() for name, each in self._parameters.items()}

    @torch.no_grad()
    def put_back(self) -> bool:
        """Give the model the weights of the best evaluation, where they were kept. Returns whether there were others
        since."""
        for name, value in self.weights.items():
            self._parameters[name].copy_(value)
        return bool(self.weights) and self._num_since > 0

    @property
    def state(self) -> dict[str, Any]:
        """For a snapshot, beside `weights`."""
        cost = None if self.step is None else self.cost
        return {"step": self.step, "cost": cost, "num_since": self._num_since, "judged_step": self._judged_step}

    def restore(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Without the weights of the best evaluation, as in the snapshot of a run that did not keep them, the next one
        is the best."""
        self._judged_step = state["judged_step"]
        if self.patience and not weights:
            return
        self.step, self._num_since = state["step"], state["num_since"]
        self.cost = math.inf if state["cost"] is None else state["cost"]
        if self.patience:
            self.weights = {name: each.to(self._parameters[name].device) for name, each in weights.items()}
