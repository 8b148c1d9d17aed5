"""What became of a prompt. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qnext.engine.policy.request import FinishReason, Request, SampledToken


@dataclass(frozen=True)
class Completion:
    """What became of one prompt, or of completion `index` of those that were asked for.

    `sampled` and `prompt_sampled` hold log-probabilities when they were asked for, else nothing; of several
    completions the first alone has the prompt's. The first token of a prompt has none. `num_cached_tokens` of the
    prompt were not computed for this request. With `EngineConfig.keep_routing`, `routing`
    [T, L, top_k] has the experts of all tokens but the last, which is never computed, in the L sparse layers, in the
    order of their weights.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    sampled: tuple[SampledToken, ...]
    num_cached_tokens: int = 0
    prompt_sampled: tuple[SampledToken, ...] = ()
    index: int = 0
    routing: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, request: Request, index: int) -> Completion:
        """Of a request that has ended."""
        assert request.finish_reason is not None
        return cls(
            request_id=request.id,
            prompt_ids=request.prompt_ids,
            output_ids=tuple(request.output_ids),
            finish_reason=request.finish_reason,
            seed=request.seed,
            sampled=tuple(request.sampled),
            num_cached_tokens=request.num_cached_tokens or 0,
            prompt_sampled=tuple(request.prompt_sampled),
            index=index,
            routing=request.routing,
        )
