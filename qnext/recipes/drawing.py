"""Answers that several processes draw together: each has a whole copy of the model, and draws those to its share of the
prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from qnext.engine import Completion, SamplingParams
from qnext.model import CausalLM
from qnext.recipes.rollouts import draw_answers
from qnext.training.ranks import ALONE, TrainingRanks


class DrawnTogether:
    """Draws by the model in training, which is whole when this is made, and cut later. Every draw is one of all
    processes; where kernels serve the model, its tokens are those that one process draws."""

    def __init__(self, model: CausalLM, ranks: TrainingRanks) -> None:
        self._model, self._ranks = model, ranks
        self._copy = model if ranks is ALONE else copy.deepcopy(model)

    @torch.no_grad()
    def whole(self) -> CausalLM:
        """The model as it is now."""
        if self._copy is not self._model:
            targets = dict(self._copy.named_parameters())
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    targets[name].copy_(self._ranks.value(parameter))
        return self._copy

    def __call__(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options: Any
    ) -> list[Completion]:
        """As draw_answers; all have all answers. Each of `params` asks for as many as the others."""
        model, ranks = self.whole(), self._ranks
        own = slice(ranks.share, None, ranks.num_shares)
        answers = draw_answers(model, prompts[own], params[own], **options) if prompts[own] else []
        size = params[0].n
        drawn = ranks.gather_objects(answers)
        groups = [[found[start : start + size] for start in range(0, len(found), size)] for found in drawn]
        return [answer for place in range(len(prompts)) for answer in groups[place % len(groups)][place // len(groups)]]
