"""Requests and logits for tests of sampling, and plain decoding by windows of one row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from qnext.engine.policy.request import Request, SampledToken, SamplingParams
from qnext.engine.sampling.sampler import Window, verify

VOCAB_SIZE = 41


def request(
    params: SamplingParams,
    *,
    prompt: tuple[int, ...] = (1,),
    output: Sequence[int] = (),
    stop: Collection[int] = (),
    max_tokens: int = 10**6,
) -> Request:
    made = Request("r", prompt, params, seed=params.seed or 0, max_tokens=max_tokens, stop_ids=frozenset(stop))
    for token in output:
        made.append(SampledToken(token))
    return made


def logits(num_rows: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def sample(logits_RY: torch.Tensor, requests: Sequence[Request]) -> list[SampledToken]:
    """The next token of every request."""
    verdicts = verify(logits_RY, [Window(made) for made in requests])
    assert all(verdict.failure is None and len(verdict.tokens) == 1 for verdict in verdicts)
    return [verdict.tokens[0] for verdict in verdicts]
