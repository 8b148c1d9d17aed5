"""Requests in, tokens out: scheduler, runner and sampler put together."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import replace
from types import TracebackType

import torch

from qnext.engine.cache import BLOCK_SIZE, Cache, prompt_grid
from qnext.engine.completion import Completion
from qnext.engine.expert_load import ExpertCounter, ExpertCounts, ExpertLoad
from qnext.engine.memory import MemoryPlan
from qnext.engine.metrics import EngineMetrics, MetricsRecorder
from qnext.engine.params import SamplingParams
from qnext.engine.recovery import blame, draft
from qnext.engine.request import (
    FinishReason,
    Guide,
    Request,
    RequestTimes,
    SampledToken,
    checked_prompt,
    output_allowance,
)
from qnext.engine.runner import Runner
from qnext.engine.sampling.sampler import Window, verify
from qnext.engine.sampling.seeds import child_seed
from qnext.engine.scheduling.scheduler import Scheduler
from qnext.engine.sizes import WantedSizes, choose_sizes, wants_drafter
from qnext.engine.speculation.drafter import DEFAULT_DRAFT_TOKENS, Drafter
from qnext.engine.step import EndEvent, Limits, StepPlan, StepResult, TokenEvent
from qnext.engine.storage.tiers import DiskCache, make_tiers
from qnext.errors import UsageError, is_fault
from qnext.model import CausalLM


class Engine:
    """Generates with one model on its device; token ids only. Not thread-safe: one thread owns it.

    `max_model_len` (default: the model's context; never more than the cache holds) bounds prompt and answer of a
    request together. A step takes `max_num_batched_tokens` at most, by default between 512 and 2,048: more where many
    experts share them. KV memory is `num_blocks` blocks of 16 tokens, or as many as `kv_budget_bytes` holds, or by
    default what `max_num_seqs` requests of full length can use, at most half of the free memory. The caches get their
    memory here and now; what is left must hold the largest step: sizes that are not given shrink until it does, and
    given ones that are too large raise DoesNotFit.

    With `prefix_cache`, requests of one salt share what they have in common: `num_checkpoints` states beside those of
    running requests (default: `max_num_seqs` and four more) say from where others can go on, of long prompts one every
    `checkpoint_interval` tokens; docs/hybrid-cache.md tells how.

    With `speculation` (default: where the model has an MTP layer) that layer drafts up to `max_draft_tokens` tokens of
    a request, as many as make decoding faster, and the next step verifies them together; answers stay the same, token
    for token. Without it, `max_draft_tokens` is how many whoever owns the engine may put into `Request.drafts`.

    Cached prefixes that memory is too short for go to `host_cache_bytes` of the host's memory (default: on a GPU an
    eighth of what is free there, else none) and from there to the `disk_cache`, where an engine of the same model and
    settings finds them again. Such an engine is to be closed; it is a context manager. Raises UsageError for a folder
    that another engine uses, or that is none of this kind.

    `eos_token_ids` (default: the config's) end a request unless it says ignore_eos. Keys and values are kept in
    `kv_dtype` (default: the model's; int8 has an fp32 scale per token and head), recurrent states in `state_dtype`,
    fp32 or bf16 (docs/hybrid-cache.md tells what that changes). Owners of requests share
    seats, memory and steps fairly (docs/hybrid-cache.md). `count_experts` is for `expert_load`. `poison` fills freed
    memory with NaN (for tests).
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
        state_dtype: torch.dtype = torch.float32,
        prefix_cache: bool = True,
        num_checkpoints: int | None = None,
        checkpoint_interval: int = 4096,
        speculation: bool | None = None,
        max_draft_tokens: int | None = None,
        disk_cache: DiskCache | None = None,
        host_cache_bytes: int | None = None,
        eos_token_ids: Collection[int] | None = None,
        count_experts: bool = True,
        poison: bool = False,
    ) -> None:
        config = model.config
        self.model = model
        has_drafter = wants_drafter(speculation, has_layer=model.mtp is not None)
        if max_draft_tokens is None:
            max_draft_tokens = DEFAULT_DRAFT_TOKENS if has_drafter else 0
        if has_drafter and max_draft_tokens < 1:
            raise UsageError(f"max_draft_tokens must be at least 1 to speculate, not {max_draft_tokens}")
        self.eos_token_ids = frozenset(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._sizes = sizes = choose_sizes(
            model,
            WantedSizes(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len,
                num_blocks=num_blocks, kv_budget_bytes=kv_budget_bytes, kv_dtype=kv_dtype or model.dtype,
                has_prefix_cache=prefix_cache, num_checkpoints=num_checkpoints, max_draft_tokens=max_draft_tokens,
                has_drafter=has_drafter, state_dtype=state_dtype,
            ),
        )  # fmt: skip
        self.max_model_len = sizes.max_model_len
        limits = Limits(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            block_size=BLOCK_SIZE,
            num_blocks=sizes.num_blocks or None,
            num_slots=sizes.num_slots,
            chunk_size=prompt_grid(model.device, state_dtype),
            has_states=config.num_linear_layers > 0,
            has_prefix_cache=prefix_cache,
            checkpoint_interval=checkpoint_interval,
            max_draft_tokens=max_draft_tokens,
        )
        experts = ExpertCounter(config, model.device) if count_experts and config.num_experts else None
        self.cache = Cache(
            config, num_blocks=sizes.num_blocks, num_slots=sizes.num_slots, max_model_len=self.max_model_len,
            dtype=model.dtype, kv_dtype=kv_dtype, state_dtype=state_dtype, device=model.device, poison=poison,
            num_draft_tokens=max_draft_tokens + 1 if max_draft_tokens else 0, has_drafter=has_drafter,
            expert_load=None if experts is None else experts.of_layer,
        )  # fmt: skip
        self.tiers = make_tiers(model, self.cache, prefix_cache, disk_cache, host_cache_bytes)
        self.scheduler = Scheduler(limits, self.tiers)
        self.runner = Runner(model, self.cache)
        self.drafter = (
            Drafter(model, self.cache, self.runner.watch, max_draft_tokens=max_draft_tokens) if has_drafter else None
        )
        self._recorder = MetricsRecorder(self.scheduler, experts)
        self._requests: dict[str, Request] = {}
        self._num_added = 0
        self._is_closed = False

    @property
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do; parked requests give it nothing."""
        return self.scheduler.has_unfinished

    @property
    def metrics(self) -> EngineMetrics:
        """What was done so far and is held now. Any thread may ask, at any time, and sees whole steps."""
        return self._recorder.snapshot()

    def expert_load(self, num_steps: int = 1) -> ExpertLoad | None:
        """Tokens of each expert, from the first step on and in the last `num_steps`, at most 64. Any thread may ask, as
        for `metrics`. None without experts or `count_experts`."""
        counts = self.expert_counts(num_steps)
        return None if counts is None else counts.report()

    def expert_counts(self, num_steps: int = 1) -> ExpertCounts | None:
        """The same as arrays, a hundred times quicker: for whoever asks several times a second."""
        return self._recorder.expert_counts(num_steps)

    @property
    def memory_plan(self) -> MemoryPlan:
        """Where the memory goes: weights and caches as allocated, and a bound on what steps take beside."""
        workspace = self._sizes.workspace_bytes
        return MemoryPlan.of(
            self.model, self.cache, self.scheduler, max_model_len=self.max_model_len, workspace_bytes=workspace
        )

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: str = "",
        owner: str = "",
        guide: Guide | None = None,
        timeout: float | None = None,
    ) -> Request:
        """Queue a prompt; `step` brings it forward. The request ends by itself, by `abort`, or after `timeout` seconds.

        Only requests of one `salt` share cached prefixes; all of one `owner` count together where owners share what the
        engine has, and a salt belongs to one owner. `guide` says which tokens may be chosen, for this request
        alone; it must come to an end, so it does not go together with ignore_eos.

        Raises UsageError for an empty prompt, a token outside the vocabulary, parameters that leave nothing to choose,
        n other than 1 or an id in use, DoesNotFit for a prompt and answer longer than the context or the cache. Other
        requests are not touched by a refused one.
        """
        if self._is_closed:
            raise UsageError("the engine is closed")
        params = params or SamplingParams()
        if params.n != 1:
            raise UsageError(f"n is {params.n}: several completions are several requests")
        if guide is not None and params.ignore_eos:
            raise UsageError("a constraint ends with the answer's end, which ignore_eos forbids")
        if timeout is not None and not timeout > 0:
            raise UsageError(f"timeout must be positive, not {timeout}")
        prompt = checked_prompt(prompt_ids, vocab_size=self.model.config.vocab_size)
        if request_id is None:
            request_id = f"request-{self._num_added}"
        if request_id in self._requests:
            raise UsageError(f"request id {request_id!r} is in use")
        now = time.monotonic()
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.eos_token_ids
        params.check_vocabulary(vocab_size=self.model.config.vocab_size, stop_ids=stop_ids)
        request = Request(
            id=request_id,
            prompt_ids=prompt,
            params=params,
            seed=secrets.randbits(53) if params.seed is None else params.seed,
            max_tokens=output_allowance(len(prompt), params, max_model_len=self.max_model_len),
            stop_ids=stop_ids,
            salt=salt,
            owner=owner,
            guide=guide,
            deadline=None if timeout is None else now + timeout,
            times=RequestTimes(arrived=now),
        )
        self.scheduler.add(request)
        self._requests[request_id] = request
        self._num_added += 1
        self._recorder.add_request()
        return request

    def add_requests(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: str = "",
        owner: str = "",
        guide: Guide | None = None,
        timeout: float | None = None,
    ) -> list[Request]:
        """Queue `params.n` requests for one prompt, all or none. Arguments and errors as add_request.

        Request i has the seed `child_seed(seed, i)`, the first one the seed itself, and answers as it would if asked
        for alone with that seed. With n above 1, ids are the request id with "-0", "-1" and so on. The prompt's
        log-probabilities come with the first.
        """
        params = params or SamplingParams()
        if params.n == 1:
            return [
                self.add_request(
                    prompt_ids, params, request_id=request_id, salt=salt, owner=owner, guide=guide, timeout=timeout
                )
            ]
        seed = secrets.randbits(53) if params.seed is None else params.seed
        name = f"request-{self._num_added}" if request_id is None else request_id
        requests: list[Request] = []
        try:
            for index in range(params.n):
                child = replace(
                    params, n=1, seed=child_seed(seed, index),
                    prompt_logprobs=params.prompt_logprobs if index == 0 else None,
                )  # fmt: skip
                requests.append(
                    self.add_request(
                        prompt_ids, child, request_id=f"{name}-{index}", salt=salt, owner=owner,
                        guide=None if guide is None else guide.copy(), timeout=timeout,
                    )
                )  # fmt: skip
        except BaseException:
            for request in requests:
                self.abort(request.id)
            raise
        return requests

    def abort(self, request_id: str) -> None:
        """End a request now. An id that is not running is ignored: it may have finished a moment ago."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.abort(request)
            self._recorder.end_request(request)

    def rest(self, request: Request, *, is_parked: bool) -> None:
        """Between two steps: a parked request holds no slot until it is to go on; its answer does not change."""
        (self.scheduler.park if is_parked else self.scheduler.resume)(request)
        self._recorder.rest_request()

    def step(self) -> list[TokenEvent | EndEvent]:
        """One step of the model: the tokens that it brought; [] when idle.

        A request whose time is over, for which no token may be chosen, or at which the model or a constraint breaks,
        ends with an EndEvent; see its `failure`. Where the model raises at several together, they are run again,
        apart. A step that raises without any request ends nobody but those that it was to begin.
        """
        ended: list[TokenEvent | EndEvent] = self._end_late()
        if self.drafter is not None:
            draft(self.drafter, self.scheduler.decoding)
        started = time.perf_counter()
        plan = self.scheduler.plan()
        if plan is None:
            self._spill()
            return ended
        self._recorder.begin_step(plan)
        try:
            self._spill()
            output = self.runner.run(plan)
            windows = [Window(s.request, s.drafts, s.request.guide) for s in output.sequences]
            verdicts = verify(output.logits_RY, windows)
        except BaseException as error:
            return [*ended, *self._fail_step(plan, error)]
        for request, found, failure in output.prompt_tokens:
            request.prompt_sampled += found
            if failure is not None:
                request.failure = failure
                ended.append(self._end(request, "error"))
        tokens: dict[str, Sequence[SampledToken]] = {}
        for (request, drafts, _), verdict in zip(windows, verdicts, strict=True):
            tokens[request.id] = verdict.tokens
            if drafts and request.slot is not None:
                self.cache.commit(request.slot, len(verdict.tokens))
            if verdict.failure is not None and request.failure is None:
                request.failure = verdict.failure
                ended.append(self._end(request, "error"))
        events = self.scheduler.commit(StepResult(tokens))
        self._spill()
        if self.drafter is not None:
            seconds = time.perf_counter() - started
            self.drafter.learn(windows, verdicts, seconds=seconds if output.was_prepared else None)
        self._recorder.end_step(plan, tokens, events, self._requests)
        for event in events:
            if event.finish_reason is not None:
                del self._requests[event.request_id]
        return [*events, *ended]

    def _fail_step(self, plan: StepPlan, error: BaseException) -> list[EndEvent]:
        """What ends with a step that raised; raises what is nobody's failure."""
        if plan.sequences and is_fault(error):
            culprit = blame(self.scheduler, plan, error, unfinished=self._requests.values())
            self._recorder.fail_step([])
            if culprit is None or culprit.finish_reason is not None:
                return []
            ended = self._end(culprit, "error")
            self._recorder.end_request(culprit)
            return [ended]
        failed = self.scheduler.discard_step()
        for request in failed:
            self._requests.pop(request.id, None)
        self._recorder.fail_step(failed)
        raise error

    def _end_late(self) -> list[TokenEvent | EndEvent]:
        now = time.monotonic()
        late = [r for r in self._requests.values() if r.deadline is not None and r.deadline <= now]
        events = [self._end(request, "deadline") for request in late]
        for request in late:
            self._recorder.end_request(request)
        return [*events]

    def _end(self, request: Request, reason: FinishReason) -> EndEvent:
        del self._requests[request.id]
        self.scheduler.abort(request, reason)
        return EndEvent(request.id, reason)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete all prompts; `params` is one for all or one for each. Errors as add_request, before any runs.

        A prompt has `n` completions, one after another.
        """
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        requests: list[Request] = []
        indices: list[int] = []
        try:
            for prompt, chosen in zip(prompts, each, strict=True):
                children = self.add_requests(prompt, chosen)
                requests += children
                indices += range(len(children))
            while any(request.finish_reason is None for request in requests):
                self.step()
                if (fault := next((r.fault for r in requests if r.fault is not None), None)) is not None:
                    raise fault
        finally:
            for request in requests:
                self.abort(request.id)
        return [Completion.of(request, index) for request, index in zip(requests, indices, strict=True)]

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
                for event in self.step():
                    if isinstance(event, TokenEvent) and event.request_id == request.id:
                        yield event
            if request.failure is not None:
                raise request.fault or request.failure
        finally:
            self.abort(request.id)

    def _spill(self) -> None:
        if self.tiers is not None and self.scheduler.prefixes is not None:
            self.tiers.save(self.scheduler.prefixes.drain_spills())

    def close(self) -> None:
        """Abort what is unfinished, and write the cached prefixes to disk where there is a disk cache."""
        if self._is_closed:
            return
        self._is_closed = True
        for request_id in list(self._requests):
            self.abort(request_id)
        prefixes = self.scheduler.prefixes
        if self.tiers is not None and prefixes is not None:
            plan = self.scheduler.plan()
            if plan is not None:  # copies of states that were to be made with the next step
                self.cache.prepare(plan)
                self.scheduler.commit(StepResult({}))
            self.tiers.close([*prefixes.drain_spills(), *prefixes.everything()])

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_integrity(self) -> None:
        """No block or slot is lost or owned twice, and the engine knows exactly the unfinished requests."""
        self.scheduler.check_integrity()
        scheduler = self.scheduler
        assert len(self._requests) == scheduler.num_waiting + scheduler.num_running + scheduler.num_parked
