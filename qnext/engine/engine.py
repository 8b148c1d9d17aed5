"""Requests in, tokens out: scheduler, runner and sampler put together."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

import torch

from qnext.config import ModelConfig
from qnext.engine.cache import BLOCK_SIZE, Cache
from qnext.engine.memory import MemoryPlan, available_bytes, weight_bytes
from qnext.engine.request import FinishReason, Request, SampledToken, SamplingParams, checked_prompt, output_allowance
from qnext.engine.runner import Runner
from qnext.engine.sampler import sample
from qnext.engine.scheduler import Limits, Scheduler, StepResult, TokenEvent
from qnext.errors import UsageError
from qnext.model import CausalLM
from qnext.ops import DELTA_CHUNK_SIZE
from qnext.planning import kv_bytes_per_token


@dataclass(frozen=True)
class Completion:
    """What became of one prompt. `sampled` holds log-probabilities when they were asked for, else nothing."""

    request_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    sampled: tuple[SampledToken, ...]


class Engine:
    """Generates with one model on its device; token ids only. Not thread-safe: one thread owns it.

    `max_model_len` (default: the model's context; never more than the cache holds) bounds prompt and answer of a
    request together. A step takes `max_num_batched_tokens` at most, by default between 512 and 2,048: more where many
    experts share them. KV memory is
    `num_blocks` blocks of 16 tokens, or as many as `kv_budget_bytes` holds, or by default what `max_num_seqs` requests
    of full length can use, at most half of the free memory. `eos_token_ids` (default: the config's) end a request
    unless it says ignore_eos. Keys and values are kept in `kv_dtype` (default: the model's; int8 has an fp32 scale per
    token and head). `poison` fills freed memory with NaN (for tests).
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        num_blocks: int | None = None,
        kv_budget_bytes: int | None = None,
        kv_dtype: torch.dtype | None = None,
        eos_token_ids: Collection[int] | None = None,
        poison: bool = False,
    ) -> None:
        config = model.config
        self.model = model
        self.max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
        if not 2 <= self.max_model_len <= config.max_position_embeddings:
            raise UsageError(
                f"max_model_len must be between 2 and the model's context of {config.max_position_embeddings}, "
                f"not {self.max_model_len}"
            )
        self.eos_token_ids = frozenset(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        blocks = _choose_num_blocks(
            model, max_num_seqs=max_num_seqs, max_model_len=self.max_model_len, num_blocks=num_blocks,
            kv_budget_bytes=kv_budget_bytes, kv_dtype=kv_dtype or model.dtype,
        )  # fmt: skip
        has_blocks = config.num_full_layers > 0
        if has_blocks:
            # A cache smaller than the context is the context.
            self.max_model_len = min(self.max_model_len, blocks * BLOCK_SIZE)
        self.scheduler = Scheduler(
            Limits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens or _default_batched_tokens(config, max_num_seqs),
                block_size=BLOCK_SIZE,
                num_blocks=blocks if has_blocks else None,
                num_slots=max_num_seqs,
                chunk_size=DELTA_CHUNK_SIZE,
            )
        )
        self.cache = Cache(
            config, num_blocks=blocks, num_slots=max_num_seqs, max_model_len=self.max_model_len, dtype=model.dtype,
            kv_dtype=kv_dtype, device=model.device, poison=poison,
        )  # fmt: skip
        self.runner = Runner(model, self.cache)
        self._requests: dict[str, Request] = {}
        self._num_added = 0

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where the memory goes, from what is really allocated."""
        return MemoryPlan(
            weight_bytes=weight_bytes(self.model),
            kv_bytes=self.cache.kv_bytes,
            num_blocks=self.scheduler.blocks.size,
            block_size=BLOCK_SIZE,
            state_bytes=self.cache.state_bytes,
            num_slots=self.scheduler.slots.size,
            max_model_len=self.max_model_len,
        )

    def add_request(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Request:
        """Queue a prompt; `step` brings it forward. The request ends by itself or by `abort`.

        Raises UsageError for an empty prompt, a token outside the vocabulary or an id in use, DoesNotFit for a prompt
        and answer longer than the context or the cache. Other requests are not touched by a refused one.
        """
        params = params or SamplingParams()
        prompt = checked_prompt(prompt_ids, vocab_size=self.model.config.vocab_size)
        if request_id is None:
            request_id = f"request-{self._num_added}"
        if request_id in self._requests:
            raise UsageError(f"request id {request_id!r} is in use")
        stop_ids = frozenset(params.stop_token_ids)
        request = Request(
            id=request_id,
            prompt_ids=prompt,
            params=params,
            seed=secrets.randbits(53) if params.seed is None else params.seed,
            max_tokens=output_allowance(len(prompt), params, max_model_len=self.max_model_len),
            stop_ids=stop_ids if params.ignore_eos else stop_ids | self.eos_token_ids,
        )
        self.scheduler.add(request)
        self._requests[request_id] = request
        self._num_added += 1
        return request

    def abort(self, request_id: str) -> None:
        """End a request now. An id that is not running is ignored: it may have finished a moment ago."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.abort(request)

    def step(self) -> list[TokenEvent]:
        """One step of the model: the tokens that it brought, one at most for each request; [] when idle.

        When the model raises, the requests of the step are aborted (their caches are spoiled), the others live on,
        and the error goes to the caller.
        """
        plan = self.scheduler.plan()
        if plan is None:
            return []
        try:
            output = self.runner.run(plan)
            tokens = sample(output.logits_RY, output.requests)
        except BaseException:
            for request in self.scheduler.discard_step():
                self._requests.pop(request.id, None)
            raise
        result = StepResult({request.id: token for request, token in zip(output.requests, tokens, strict=True)})
        events = self.scheduler.commit(result)
        for event in events:
            if event.finish_reason is not None:
                self._requests.pop(event.request_id, None)
        return events

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete all prompts; `params` is one for all or one for each. Errors as add_request, before any runs."""
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        requests: list[Request] = []
        try:
            for prompt, chosen in zip(prompts, each, strict=True):
                requests.append(self.add_request(prompt, chosen))
            while any(request.finish_reason is None for request in requests):
                self.step()
        finally:
            for request in requests:
                self.abort(request.id)
        return [_completion(request) for request in requests]

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams | None = None
    ) -> Generator[TokenEvent, None, None]:
        """Tokens of one prompt as they come. The prompt is checked now; closing the generator aborts the request.

        Other requests go on in the same steps; their tokens are found in their Request. Advance the generator at
        least once: Python runs nothing when one is closed before its start, and the request would go on.
        """
        return self._stream(self.add_request(prompt_ids, params))

    def _stream(self, request: Request) -> Generator[TokenEvent, None, None]:
        try:
            while request.finish_reason is None:
                yield from (event for event in self.step() if event.request_id == request.id)
        finally:
            self.abort(request.id)

    def check_integrity(self) -> None:
        """No block or slot is lost or owned twice, and the engine knows exactly the unfinished requests."""
        self.scheduler.check_integrity()
        assert len(self._requests) == self.scheduler.num_waiting + self.scheduler.num_running


def _completion(request: Request) -> Completion:
    assert request.finish_reason is not None
    return Completion(
        request_id=request.id,
        prompt_ids=request.prompt_ids,
        output_ids=tuple(request.output_ids),
        finish_reason=request.finish_reason,
        seed=request.seed,
        sampled=tuple(request.sampled),
    )


def _default_batched_tokens(config: ModelConfig, max_num_seqs: int) -> int:
    """So many that each expert of a layer sees some forty rows on average, and its weights are read for those."""
    wanted = 40 * config.num_experts // max(1, config.num_experts_per_tok)
    return max(512, min(2048, wanted), max_num_seqs - 1 + DELTA_CHUNK_SIZE)


def _choose_num_blocks(
    model: CausalLM, *, max_num_seqs: int, max_model_len: int, num_blocks: int | None, kv_budget_bytes: int | None,
    kv_dtype: torch.dtype,
) -> int:  # fmt: skip
    dtype = str(kv_dtype).removeprefix("torch.")
    block_bytes = BLOCK_SIZE * kv_bytes_per_token(model.config, dtype=dtype)
    if block_bytes == 0:
        return 0
    if num_blocks is not None and kv_budget_bytes is not None:
        raise UsageError("give num_blocks or kv_budget_bytes, not both")
    if num_blocks is None:
        useful = max(1, max_num_seqs) * -(-max_model_len // BLOCK_SIZE)
        budget = available_bytes(model.device) // 2 if kv_budget_bytes is None else kv_budget_bytes
        num_blocks = min(useful, budget // block_bytes)
    if num_blocks < 1:
        raise UsageError(f"the KV cache needs at least one block of {block_bytes} bytes")
    return num_blocks
