"""Requests in, tokens out: the loop over drafting, planning, executing, verifying, committing and learning."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType

from qnext.engine.assembly import make_parts
from qnext.engine.config import EngineConfig
from qnext.engine.drafter import Proposer
from qnext.engine.execution.executor import Executor, PromptPart, StepOutput
from qnext.engine.execution.expert_load import ExpertCounts, ExpertLoad
from qnext.engine.memory import MemoryPlan
from qnext.engine.metrics import EngineMetrics, MetricsRecorder
from qnext.engine.policy.completion import Completion
from qnext.engine.policy.intake import Intake
from qnext.engine.policy.params import SamplingParams
from qnext.engine.policy.request import FinishReason, Guide, Request, SampledToken
from qnext.engine.policy.scheduler import OwnerGauges, Scheduler
from qnext.engine.policy.step import EndEvent, StepPlan, StepResult, TokenEvent
from qnext.engine.sampling.sampler import Verdict, Window, verify
from qnext.engine.sampling.seeds import child_seed
from qnext.errors import QnextError, RequestBroke, UsageError, ends_engine, is_fault
from qnext.model import CausalLM

_log = logging.getLogger("qnext.engine")


class Engine:
    """Generates with one model; token ids only. Not thread-safe: one thread owns it.

    `Engine.of` makes one for a model in this process. Otherwise what runs the plans is given, and who makes them;
    `drafter` says what may follow, None: nothing. `eos_token_ids` are the model's by default. An engine with a disk
    cache is to be closed; it is a context manager. Owners of requests share seats, memory and steps fairly
    (docs/hybrid-cache.md).
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        max_model_len: int,
        drafter: Proposer | None = None,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.drafter = drafter
        self.max_model_len = max_model_len
        self.model_config = executor.model_config
        self.eos_token_ids = frozenset(self.model_config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._intake = Intake(self.model_config.vocab_size, max_model_len, self.eos_token_ids)
        self._recorder = MetricsRecorder(scheduler, executor.experts, executor.expert_reads)
        self._requests: dict[str, Request] = {}
        self._num_added = 0
        self._is_closed = False

    @classmethod
    def of(cls, model: CausalLM, config: EngineConfig | None = None) -> Engine:
        """An engine of its own for a model, here.

        Raises UsageError for contradictory or impossible options, and for the folder of a disk cache that another
        engine uses or that is none of this kind; DoesNotFit where the sizes do not fit the memory.
        """
        config = config or EngineConfig()
        executor, scheduler, drafter, max_model_len = make_parts(model, config)
        eos_token_ids = config.eos_token_ids
        return cls(executor, scheduler, max_model_len=max_model_len, drafter=drafter, eos_token_ids=eos_token_ids)

    # ---- what it is and does ----

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
        return MemoryPlan.of(self.executor.held_bytes(), self.scheduler.limits, max_model_len=self.max_model_len)

    @property
    def max_num_seqs(self) -> int:
        """Requests that run side by side."""
        return self.scheduler.limits.max_num_seqs

    @property
    def num_waiting(self) -> int:
        """Requests that have no seat and want one."""
        return self.scheduler.num_waiting

    def num_waiting_of(self, owner: str) -> int:
        return self.scheduler.num_waiting_of(owner)

    def by_owner(self) -> dict[str, OwnerGauges]:
        """What each owner that has or wants anything holds by now. Any thread may ask."""
        return self.scheduler.by_owner()

    # ---- requests ----

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: str = "",
        owner: str = "",
        adapter: str | None = None,
        guide: Guide | None = None,
        timeout: float | None = None,
    ) -> Request:
        """Queue a prompt; `step` brings it forward. The request ends by itself, by `abort`, or after `timeout` seconds.

        What `salt`, `owner` and `guide` are stands at `Request`; a guide is this request's alone and must come to an
        end, so it does not go together with ignore_eos. `adapter` is a name of EngineConfig.adapters. Raises UsageError
        for an empty prompt, a token outside the vocabulary, an unknown adapter, parameters that leave nothing to
        choose, n other than 1 or an id in use, DoesNotFit for a prompt and answer longer than the context or the cache;
        other requests are not touched by a refused one.
        """
        if self._is_closed:
            raise UsageError("the engine is closed")
        name = f"request-{self._num_added}" if request_id is None else request_id
        if name in self._requests:
            raise UsageError(f"request id {name!r} is in use")
        number, salt = self._adapter(adapter, salt)
        request = self._intake.make(
            name,
            prompt_ids,
            params or SamplingParams(),
            salt=salt,
            owner=owner,
            adapter=number,
            guide=guide,
            timeout=timeout,
        )
        self.scheduler.add(request)
        self._requests[name] = request
        self._num_added += 1
        self._recorder.add_request()
        return request

    def _adapter(self, name: str | None, salt: str) -> tuple[int, str]:
        """The number of an adapter, and the salt of its prefixes: keys, values and states are those of one adapter."""
        if name is None:
            return 0, salt
        fingerprints = self.executor.adapters
        if name not in fingerprints:
            raise UsageError(f"no adapter {name!r}; there are: {', '.join(fingerprints) or 'none'}")
        return list(fingerprints).index(name) + 1, f"{salt}/{fingerprints[name]}"

    def add_requests(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: str = "",
        owner: str = "",
        adapter: str | None = None,
        guide: Guide | None = None,
        timeout: float | None = None,
    ) -> list[Request]:
        """Queue `params.n` requests for one prompt, all or none. Arguments and errors as add_request.

        Request i has the seed `child_seed(seed, i)`, the first one the seed itself, and answers as it would if asked
        for alone with that seed. With n above 1, ids are the request id with "-0", "-1" and so on. The prompt's
        log-probabilities come with the first.
        """
        params = params or SamplingParams()
        add = partial(self.add_request, prompt_ids, salt=salt, owner=owner, adapter=adapter, timeout=timeout)
        if params.n == 1:
            return [add(params, request_id=request_id, guide=guide)]
        seed = secrets.randbits(53) if params.seed is None else params.seed
        name = f"request-{self._num_added}" if request_id is None else request_id
        requests: list[Request] = []
        try:
            for index in range(params.n):
                child = replace(params, n=1, seed=child_seed(seed, index))
                if index:
                    child = replace(child, prompt_logprobs=None)
                own = None if guide is None else guide.copy()
                requests.append(add(child, request_id=f"{name}-{index}", guide=own))
        except BaseException:
            for request in requests:
                self.abort(request.id)
            raise
        return requests

    def abort(self, request_id: str) -> None:
        """End a request now. An id that is not running is ignored: it may have finished a moment ago."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.abort(request_id)
            self._recorder.end_request(request)

    def rest(self, request: Request, *, is_parked: bool) -> None:
        """Between two steps: a parked request holds no slot until it is to go on; its answer does not change."""
        (self.scheduler.park if is_parked else self.scheduler.resume)(request.id)
        self._recorder.rest_request()

    def run_apart(self, request: Request) -> None:
        """From now on the steps of a request have no other in them: what fails there is its failure alone."""
        self.scheduler.recovery.set_apart(request.id, until=request.max_cached_tokens + 1)

    # ---- steps ----

    def step(self) -> list[TokenEvent | EndEvent]:
        """One step of the model: the tokens that it brought; [] when idle.

        A request whose time is over, for which no token may be chosen, or at which the model or a constraint breaks,
        ends with an EndEvent; see its `failure`. Where the model raises at several together, they are run again,
        apart. A step that raises without any request ends nobody but those that it was to begin.
        """
        ended = self._end_late()
        drafts = {} if self.drafter is None else self.drafter.draft(self.scheduler.decoding)
        started = time.perf_counter()
        plan = self.scheduler.plan(drafts)
        if plan is None:
            self._save()
            return [*ended]
        requests = {s.request_id: self._requests[s.request_id] for s in plan.sequences}
        self._recorder.begin_step(requests.values())
        try:
            output = self.executor.execute(plan)
            windows = _windows(plan, output, requests)
            verdicts = verify(output.logits_RY, windows)
        except BaseException as error:
            return [*ended, *self._fail_step(plan, error)]
        ended += self._end_failed(windows, verdicts, output.prompt_tokens)
        tokens = {window.request.id: verdict.tokens for window, verdict in zip(windows, verdicts, strict=True)}
        events = self.scheduler.commit(StepResult(tokens))
        for sequence in plan.sequences:  # what one that ended leaves is there until the next step
            if (request := requests[sequence.request_id]).finish_reason is not None:
                request.routing = self.executor.routing_of(sequence.slot, request.num_tokens - 1)
        self._save()
        if self.drafter is not None:
            seconds = time.perf_counter() - started
            self.drafter.learn(windows, verdicts, seconds=seconds if output.was_prepared else None)
        self._recorder.end_step(plan, tokens, events, requests)
        for event in events:
            if event.finish_reason is not None:
                del self._requests[event.request_id]
        return [*events, *ended]

    def _end_failed(
        self, windows: list[Window], verdicts: list[Verdict], prompt_tokens: Sequence[PromptPart]
    ) -> list[EndEvent]:
        """Book what a step tells of prompts, and end those for which it has no token."""
        ended: list[EndEvent] = []
        for request_id, found, failure in prompt_tokens:
            request = self._requests[request_id]
            if failure is not None:
                request.failure = failure
                ended.append(self._end(request, "error"))
                continue
            if not request.prompt_sampled:  # the first token of a prompt has no log-probability
                request.prompt_sampled.append(SampledToken(request.prompt_ids[0]))
            request.prompt_sampled += found
        for window, verdict in zip(windows, verdicts, strict=True):
            if verdict.failure is not None and window.request.failure is None:
                window.request.failure = verdict.failure
                ended.append(self._end(window.request, "error"))
        return ended

    def _fail_step(self, plan: StepPlan, error: BaseException) -> list[EndEvent]:
        """What ends with a step that raised; raises what is nobody's failure."""
        if plan.sequences and is_fault(error) and not ends_engine(error):
            told = error if isinstance(error, QnextError) else None  # says more than that something broke
            reason = "" if told is None else f": {told}"
            _log.error("a step of %d requests failed%s", len(plan.sequences), reason, exc_info=None if told else error)
            culprit = self._requests.get(self.scheduler.retry_step() or "")
            self._recorder.fail_step([])
            if culprit is None:
                return []
            culprit.failure = told or RequestBroke.of(error, "a step of the model")
            ended = self._end(culprit, "error")
            self._recorder.end_request(culprit)
            return [ended]
        failed = self.scheduler.discard_step()
        for request in failed:
            self._requests.pop(request.id, None)
        self._recorder.fail_step(failed)
        raise error

    def _end_late(self) -> list[EndEvent]:
        now = time.monotonic()
        late = [r for r in self._requests.values() if r.deadline is not None and r.deadline <= now]
        events = [self._end(request, "deadline") for request in late]
        for request in late:
            self._recorder.end_request(request)
        return events

    def _end(self, request: Request, reason: FinishReason) -> EndEvent:
        del self._requests[request.id]
        self.scheduler.abort(request.id, reason)
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
            request.raise_failure()
        finally:
            self.abort(request.id)

    def _save(self) -> None:
        """Prefixes that go elsewhere are copied at once: the engine may be idle from now on."""
        plan = self.scheduler.plan_saving()
        if plan is not None:
            self.executor.execute(plan)

    def close(self) -> None:
        """Abort what is unfinished, and write the cached prefixes to disk where there is a disk cache."""
        if self._is_closed:
            return
        self._is_closed = True
        for request_id in list(self._requests):
            self.abort(request_id)
        self.executor.close(*self.scheduler.plan_end())

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


def _windows(plan: StepPlan, output: StepOutput, requests: Mapping[str, Request]) -> list[Window]:
    """What the rows of logits are for."""
    sampled = [plan.sequences[number] for number in output.order]
    return [Window(requests[s.request_id], s.drafts, requests[s.request_id].guide) for s in sampled]
