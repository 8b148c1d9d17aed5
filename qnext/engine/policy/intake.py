"""From what a caller asks to a request that can be queued. No torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

from qnext.engine.policy.params import SamplingParams
from qnext.engine.policy.request import Guide, Request, RequestTimes, checked_prompt, output_allowance
from qnext.engine.policy.watermark_key import MarkedPlaces
from qnext.errors import UsageError


class Intake(NamedTuple):
    """What an engine takes: tokens below `vocab_size`, prompts and answers of `max_model_len` together.
    `eos_token_ids` end a request unless it says ignore_eos."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]

    def make(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str,
        owner: str,
        adapter: int,
        guide: Guide | None,
        timeout: float | None,
    ) -> Request:
        """Raises UsageError and DoesNotFit as Engine.add_request."""
        if params.n != 1:
            raise UsageError(f"n is {params.n}: several completions are several requests")
        if guide is not None and params.ignore_eos:
            raise UsageError("a constraint ends with the answer's end, which ignore_eos forbids")
        if timeout is not None and not timeout > 0:
            raise UsageError(f"timeout must be positive, not {timeout}")
        prompt = checked_prompt(prompt_ids, vocab_size=self.vocab_size)
        now = time.monotonic()
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.eos_token_ids
        params.check_vocabulary(vocab_size=self.vocab_size, stop_ids=stop_ids)
        return Request(
            id=request_id,
            prompt_ids=prompt,
            params=params,
            seed=secrets.randbits(53) if params.seed is None else params.seed,
            max_tokens=output_allowance(len(prompt), params, max_model_len=self.max_model_len),
            stop_ids=stop_ids,
            salt=salt,
            owner=owner,
            adapter=adapter,
            guide=guide,
            marks=MarkedPlaces(params.watermark) if params.is_marked and params.watermark is not None else None,
            deadline=None if timeout is None else now + timeout,
            times=RequestTimes(arrived=now),
        )
